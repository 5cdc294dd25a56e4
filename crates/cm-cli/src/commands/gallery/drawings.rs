//! Drawings of a few flat shapes, as a person would make them with a brush.

use tch::{Device, Tensor};

type Colour = [f32; 3];

const WHITE: Colour = [255.0, 255.0, 255.0];
const YELLOW: Colour = [255.0, 204.0, 77.0];
const BROWN: Colour = [102.0, 69.0, 0.0];
const RED: Colour = [221.0, 46.0, 68.0];
const GREEN: Colour = [62.0, 114.0, 29.0];
const BLUE: Colour = [59.0, 136.0, 195.0];

/// A filled ellipse.
struct Blob {
    /// The middle, in pixels of 32.
    at: (f32, f32),
    /// Half the width and half the height.
    radius: (f32, f32),
    colour: Colour,
}

const fn blob(at: (f32, f32), radius: (f32, f32), colour: Colour) -> Blob {
    Blob { at, radius, colour }
}

/// A face, a tree, a fruit, a fish.
const DRAWINGS: [&[Blob]; 4] = [
    &[
        blob((16.0, 16.0), (14.0, 14.0), YELLOW),
        blob((11.0, 12.0), (2.0, 3.0), BROWN),
        blob((21.0, 12.0), (2.0, 3.0), BROWN),
        blob((16.0, 22.0), (6.0, 2.5), BROWN),
    ],
    &[blob((16.0, 25.0), (3.0, 7.0), BROWN), blob((16.0, 12.0), (11.0, 10.0), GREEN)],
    &[
        blob((16.0, 18.0), (11.0, 11.0), RED),
        blob((19.0, 5.0), (4.0, 2.5), GREEN),
        blob((16.0, 7.0), (1.0, 3.0), BROWN),
    ],
    &[
        blob((14.0, 17.0), (12.0, 7.0), BLUE),
        blob((27.0, 12.0), (4.0, 5.0), BLUE),
        blob((8.0, 15.0), (1.5, 1.5), BROWN),
    ],
];

/// The drawings, each `[1, 3, 32, 32]` in [−1, 1].
pub fn all(device: Device) -> Vec<Tensor> {
    DRAWINGS.iter().map(|blobs| drawn(blobs, device)).collect()
}

fn drawn(blobs: &[Blob], device: Device) -> Tensor {
    let side = super::SIDE as usize;
    let mut values = vec![0.0; 3 * side * side];
    for y in 0..side {
        for x in 0..side {
            let inside = |b: &&Blob| {
                let (dx, dy) = (x as f32 + 0.5 - b.at.0, y as f32 + 0.5 - b.at.1);
                (dx / b.radius.0).powi(2) + (dy / b.radius.1).powi(2) <= 1.0
            };
            let colour = blobs.iter().rev().find(inside).map_or(WHITE, |b| b.colour);
            for (channel, value) in colour.into_iter().enumerate() {
                values[(channel * side + y) * side + x] = value / 127.5 - 1.0;
            }
        }
    }
    Tensor::from_slice(&values).view([1, 3, super::SIDE, super::SIDE]).to_device(device)
}
