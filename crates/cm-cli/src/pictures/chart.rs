//! Line charts as pictures, drawn with embedded-graphics, whose fonts come with it: no font file and no system
//! library is needed on the machine.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::mono_font::{MonoTextStyle, ascii::FONT_8X13};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Line, PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Alignment, Text};
use image::{Rgb, RgbImage};

/// One curve.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points (x, y); those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A chart of curves over a common x axis.
pub struct Chart {
    /// Heading.
    pub title: String,
    /// Name of the x axis.
    pub x_label: String,
    /// Logarithmic y axis; values that are not positive are left out.
    pub log_y: bool,
    /// The curves.
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (900, 480);
const LEFT: i32 = 90;
const RIGHT: i32 = 20;
const TOP: i32 = 50;
const BOTTOM: i32 = 50;
const COLOURS: [Rgb888; 6] = [
    Rgb888::new(31, 119, 180),
    Rgb888::new(214, 84, 39),
    Rgb888::new(44, 140, 60),
    Rgb888::new(148, 103, 189),
    Rgb888::new(120, 90, 70),
    Rgb888::new(200, 60, 140),
];

impl Chart {
    /// Draws the chart.
    pub fn draw(&self) -> RgbImage {
        let mut canvas = Canvas(RgbImage::from_pixel(SIZE.0, SIZE.1, Rgb([255, 255, 255])));
        let y_of = |y: f64| if self.log_y { y.log10() } else { y };
        let curves: Vec<Vec<(f64, f64)>> = self
            .series
            .iter()
            .map(|s| s.points.iter().map(|&(x, y)| (x, y_of(y))).filter(|p| p.1.is_finite()).collect())
            .collect();
        let (x_axis, y_axis) = (
            Axis::over(curves.iter().flatten().map(|p| p.0), LEFT, SIZE.0 as i32 - RIGHT),
            Axis::over(curves.iter().flatten().map(|p| p.1), SIZE.1 as i32 - BOTTOM, TOP),
        );
        self.draw_axes(&mut canvas, &x_axis, &y_axis);
        for (index, (curve, series)) in curves.iter().zip(&self.series).enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let at = |&(x, y): &(f64, f64)| Point::new(x_axis.pixel(x), y_axis.pixel(y));
            for pair in curve.windows(2) {
                canvas.line(at(&pair[0]), at(&pair[1]), colour, 2);
            }
            let right = Point::new(SIZE.0 as i32 - RIGHT - 8, TOP + 18 + 18 * index as i32);
            canvas.text(&series.name, right, colour, Alignment::Right);
        }
        canvas.0
    }

    fn draw_axes(&self, canvas: &mut Canvas, x_axis: &Axis, y_axis: &Axis) {
        let (grey, black) = (Rgb888::new(225, 225, 225), Rgb888::BLACK);
        let (bottom, right) = (SIZE.1 as i32 - BOTTOM, SIZE.0 as i32 - RIGHT);
        for tick in y_axis.ticks(5) {
            let y = y_axis.pixel(tick);
            canvas.line(Point::new(LEFT, y), Point::new(right, y), grey, 1);
            let value = if self.log_y { 10f64.powf(tick) } else { tick };
            canvas.text(&number(value), Point::new(LEFT - 8, y + 4), black, Alignment::Right);
        }
        for tick in x_axis.ticks(6) {
            let x = x_axis.pixel(tick);
            canvas.line(Point::new(x, bottom), Point::new(x, bottom + 5), black, 1);
            canvas.text(&number(tick), Point::new(x, bottom + 20), black, Alignment::Center);
        }
        canvas.line(Point::new(LEFT, bottom), Point::new(right, bottom), black, 1);
        canvas.line(Point::new(LEFT, TOP), Point::new(LEFT, bottom), black, 1);
        canvas.text(&self.title, Point::new(LEFT, 28), black, Alignment::Left);
        let below = Point::new((LEFT + right) / 2, SIZE.1 as i32 - 10);
        canvas.text(&self.x_label, below, black, Alignment::Center);
    }
}

/// A picture with a line of text that begins at a point.
pub fn with_text(picture: RgbImage, text: &str, at: (i32, i32)) -> RgbImage {
    let mut canvas = Canvas(picture);
    canvas.text(text, Point::new(at.0, at.1), Rgb888::BLACK, Alignment::Left);
    canvas.0
}

struct Axis {
    low: f64,
    high: f64,
    from: i32,
    to: i32,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, from: i32, to: i32) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low < high {
            (low, high)
        } else if low.is_finite() {
            (low - 0.5, low + 0.5)
        } else {
            (0.0, 1.0)
        };
        Self { low, high, from, to }
    }

    fn pixel(&self, value: f64) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        self.from + (share * f64::from(self.to - self.from)).round() as i32
    }

    /// Round values inside the axis, about `wanted` of them.
    fn ticks(&self, wanted: usize) -> Vec<f64> {
        let raw = (self.high - self.low) / wanted as f64;
        let magnitude = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * magnitude).into_iter().find(|s| *s >= raw);
        let step = step.unwrap_or(raw);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|n| n as f64 * step).collect()
    }
}

/// A number with as many digits as a tick needs.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        a if a >= 1e6 => format!("{value:.1e}"),
        a if a >= 100.0 => format!("{value:.0}"),
        a if a >= 0.01 => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
        _ => format!("{value:.1e}"),
    }
}

struct Canvas(RgbImage);

impl Canvas {
    fn line(&mut self, from: Point, to: Point, colour: Rgb888, width: u32) {
        let Ok(()) = Line::new(from, to).into_styled(PrimitiveStyle::with_stroke(colour, width)).draw(self);
    }

    fn text(&mut self, text: &str, at: Point, colour: Rgb888, alignment: Alignment) {
        let style = MonoTextStyle::new(&FONT_8X13, colour);
        let Ok(_) = Text::with_alignment(text, at, style, alignment).draw(self);
    }
}

impl Dimensions for Canvas {
    fn bounding_box(&self) -> Rectangle {
        Rectangle::new(Point::zero(), Size::new(self.0.width(), self.0.height()))
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            let (x, y) = (at.x as u32, at.y as u32);
            if at.x >= 0 && at.y >= 0 && x < self.0.width() && y < self.0.height() {
                self.0.put_pixel(x, y, Rgb([colour.r(), colour.g(), colour.b()]));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_leaves_ink_of_its_colour_inside_the_axes() {
        let points = (0..100).map(|i| (f64::from(i), f64::from(i * i))).collect();
        let chart = Chart {
            title: "squares".into(),
            x_label: "i".into(),
            log_y: false,
            series: vec![Series { name: "i*i".into(), points }],
        };
        let image = chart.draw();
        let ink = Rgb([31, 119, 180]);
        let inked: Vec<_> = image.enumerate_pixels().filter(|(_, _, p)| **p == ink).collect();
        assert!(inked.len() > 500);
        assert!(inked.iter().all(|(x, y, _)| *x >= LEFT as u32 - 2 && *y <= SIZE.1 - BOTTOM as u32 + 2));
    }

    #[test]
    fn empty_and_constant_curves_draw() {
        for points in [vec![], vec![(0.0, 1.0)], vec![(0.0, f64::NAN), (1.0, 2.0)]] {
            let series = vec![Series { name: "a".into(), points }];
            Chart { title: String::new(), x_label: String::new(), log_y: true, series }.draw();
        }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis { low: 0.0, high: 37.0, from: 0, to: 100 };
        assert_eq!(axis.ticks(5), vec![0.0, 10.0, 20.0, 30.0]);
    }
}
