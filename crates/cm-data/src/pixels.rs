//! Between bytes and the [−1, 1] that networks see.

/// Network values to bytes: ⌊(x + 1)·127.5⌋ towards zero, clamped to 0..=255; NaN becomes 0.
///
/// This is the conversion of the reference samplers, in float32 as theirs. It truncates, so that 63
/// of the 256 bytes, whose float32 image lies a rounding error low, come back one lower from [`from_uint8`];
/// published figures include that.
///
/// ```
/// assert_eq!(cm_data::to_uint8(&[-1.0, 0.0, 1.0, -3.0, 3.0]), [0, 127, 255, 0, 255]);
/// ```
///
/// # Source
/// `image_sample` of the released consistency-model scripts: `((sample + 1) * 127.5).clamp(0, 255).to(uint8)`.
pub fn to_uint8(x: &[f32]) -> Vec<u8> {
    x.iter().map(|&v| ((v + 1.0) * 127.5).clamp(0.0, 255.0) as u8).collect()
}

/// Bytes to network values: x/127.5 − 1, in float32.
pub fn from_uint8(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|&b| f32::from(b) / 127.5 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_and_the_middle_are_exact() {
        assert_eq!(from_uint8(&[0, 255]), [-1.0, 1.0]);
        assert_eq!(to_uint8(&[-1.0, 1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]), [0, 255, 0, 255, 0]);
    }

    #[test]
    fn a_byte_comes_back_at_most_one_lower() {
        let all: Vec<u8> = (0..=255).collect();
        let back = to_uint8(&from_uint8(&all));
        let lower = all.iter().zip(&back).filter(|(a, b)| a != b).count();
        assert!(all.iter().zip(&back).all(|(a, b)| a - b <= 1));
        // Counted, so that a change of the formula does not pass unseen.
        assert_eq!(lower, 63);
    }
}
