//! Line charts as pictures, drawn with embedded-graphics, whose fonts come with it: no font file and no system
//! library is needed on the machine.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::mono_font::{MonoTextStyle, ascii::FONT_8X13};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Circle, Line, PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Alignment, Text};
use image::{Rgb, RgbImage};

/// One curve.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points (x, y); those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// How far each point may be off, drawn as a bar; as many as there are points, or none.
    pub spread: Vec<f64>,
}

impl Series {
    /// A curve.
    pub fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points, spread: Vec::new() }
    }

    /// The same curve with a bar of ± `spread` at each point.
    pub fn with_spread(self, spread: Vec<f64>) -> Self {
        Self { spread, ..self }
    }
}

/// A chart of curves over a common x axis.
#[derive(Default)]
pub struct Chart {
    /// Heading.
    pub title: String,
    /// Name of the x axis.
    pub x_label: String,
    /// Logarithmic x axis; points at values that are not positive are left out.
    pub log_x: bool,
    /// Logarithmic y axis; values that are not positive are left out.
    pub log_y: bool,
    /// Marks the points: for curves of few.
    pub dots: bool,
    /// The curves.
    pub series: Vec<Series>,
}

const SIZE: (u32, u32) = (900, 480);
const LEFT: i32 = 90;
const RIGHT: i32 = 20;
const TOP: i32 = 50;
const BOTTOM: i32 = 50;
const COLOURS: [Rgb888; 8] = [
    Rgb888::new(31, 119, 180),
    Rgb888::new(214, 84, 39),
    Rgb888::new(44, 140, 60),
    Rgb888::new(148, 103, 189),
    Rgb888::new(120, 90, 70),
    Rgb888::new(200, 60, 140),
    Rgb888::new(23, 160, 175),
    Rgb888::new(170, 150, 20),
];

impl Chart {
    /// Draws the chart.
    pub fn draw(&self) -> RgbImage {
        let mut canvas = Canvas(RgbImage::from_pixel(SIZE.0, SIZE.1, Rgb([255, 255, 255])));
        let curves: Vec<Vec<Mark>> = self.series.iter().map(|series| self.marks(series)).collect();
        let ys = curves.iter().flatten().flat_map(|mark| [mark.y, mark.low, mark.high]);
        let (x_axis, y_axis) = (
            Axis::over(curves.iter().flatten().map(|mark| mark.x), LEFT, SIZE.0 as i32 - RIGHT),
            Axis::over(ys, SIZE.1 as i32 - BOTTOM, TOP),
        );
        self.draw_axes(&mut canvas, &x_axis, &y_axis);
        for (index, (curve, series)) in curves.iter().zip(&self.series).enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let at = |mark: &Mark, y: f64| Point::new(x_axis.pixel(mark.x), y_axis.pixel(y));
            for pair in curve.windows(2) {
                canvas.line(at(&pair[0], pair[0].y), at(&pair[1], pair[1].y), colour, 2);
            }
            for mark in curve {
                if mark.low < mark.high {
                    canvas.line(at(mark, mark.low), at(mark, mark.high), colour, 1);
                }
                if self.dots {
                    canvas.dot(at(mark, mark.y), colour);
                }
            }
            let right = Point::new(SIZE.0 as i32 - RIGHT - 8, TOP + 18 + 18 * index as i32);
            canvas.text(&series.name, right, colour, Alignment::Right);
        }
        canvas.0
    }

    /// The points that can be drawn, on the axes' scales.
    fn marks(&self, series: &Series) -> Vec<Mark> {
        let scale = |log: bool, value: f64| if log { value.log10() } else { value };
        let spread = series.spread.iter().copied().chain(std::iter::repeat(0.0));
        let mark = |(&(x, y), spread): (&(f64, f64), f64)| {
            let (x, at) = (scale(self.log_x, x), scale(self.log_y, y));
            // A bar that reaches below what a logarithmic axis shows ends at its point.
            let end = |value: f64| Some(scale(self.log_y, value)).filter(|v| v.is_finite()).unwrap_or(at);
            let mark = Mark { x, y: at, low: end(y - spread), high: end(y + spread) };
            (x.is_finite() && at.is_finite()).then_some(mark)
        };
        series.points.iter().zip(spread).filter_map(mark).collect()
    }

    fn draw_axes(&self, canvas: &mut Canvas, x_axis: &Axis, y_axis: &Axis) {
        let (grey, black) = (Rgb888::new(225, 225, 225), Rgb888::BLACK);
        let (bottom, right) = (SIZE.1 as i32 - BOTTOM, SIZE.0 as i32 - RIGHT);
        for tick in y_axis.ticks(5, self.log_y) {
            let y = y_axis.pixel(tick);
            canvas.line(Point::new(LEFT, y), Point::new(right, y), grey, 1);
            let value = if self.log_y { 10f64.powf(tick) } else { tick };
            canvas.text(&number(value), Point::new(LEFT - 8, y + 4), black, Alignment::Right);
        }
        for tick in x_axis.ticks(6, self.log_x) {
            let x = x_axis.pixel(tick);
            canvas.line(Point::new(x, bottom), Point::new(x, bottom + 5), black, 1);
            let value = if self.log_x { 10f64.powf(tick) } else { tick };
            canvas.text(&number(value), Point::new(x, bottom + 20), black, Alignment::Center);
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

/// A point on the scales of the axes, and where its bar ends.
struct Mark {
    x: f64,
    y: f64,
    low: f64,
    high: f64,
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

    /// Round values inside the axis, about `wanted` of them; of a logarithmic one those whose powers of ten are round.
    fn ticks(&self, wanted: usize, log: bool) -> Vec<f64> {
        if log {
            let decades = self.low.floor() as i32..=self.high.ceil() as i32;
            let all = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|m: f64| m.log10() + f64::from(decade)));
            let inside: Vec<f64> = all.filter(|tick| (self.low..=self.high).contains(tick)).collect();
            // Over many decades their powers are enough, and within a fraction of one there are too few of these.
            if (2..=2 * wanted).contains(&inside.len()) {
                return inside;
            }
        }
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

    fn dot(&mut self, at: Point, colour: Rgb888) {
        let style = PrimitiveStyle::with_fill(colour);
        let Ok(()) = Circle::with_center(at, 7).into_styled(style).draw(self);
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
            series: vec![Series::new("i*i", points)],
            ..Chart::default()
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
            let series = vec![Series::new("a", points)];
            Chart { log_y: true, series, ..Chart::default() }.draw();
        }
    }

    #[test]
    fn bars_and_logarithmic_axes_keep_what_they_can_show() {
        let points = vec![(1.0, 4.0), (10.0, 1.0), (0.0, 2.0), (100.0, -1.0)];
        let series = vec![Series::new("a", points).with_spread(vec![1.0, 2.0, 0.0, 0.0])];
        let chart = Chart { log_x: true, log_y: true, dots: true, series, ..Chart::default() };
        let marks = chart.marks(&chart.series[0]);
        assert_eq!(marks.len(), 2, "log 0 and log -1 are nowhere");
        assert_eq!((marks[1].x, marks[1].y), (1.0, 0.0));
        assert_eq!(marks[0].low, 3f64.log10());
        assert_eq!(marks[1].low, marks[1].y, "1 - 2 is below a logarithmic axis");
        let ink = Rgb([31, 119, 180]);
        assert!(chart.draw().pixels().filter(|pixel| **pixel == ink).count() > 500);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis = Axis { low: 0.0, high: 37.0, from: 0, to: 100 };
        assert_eq!(axis.ticks(5, false), vec![0.0, 10.0, 20.0, 30.0]);
        let axis = Axis { low: 0.0, high: 35f64.log10(), from: 0, to: 100 };
        let ticks: Vec<f64> = axis.ticks(5, true).into_iter().map(|tick| 10f64.powf(tick).round()).collect();
        assert_eq!(ticks, [1.0, 2.0, 5.0, 10.0, 20.0]);
    }
}
