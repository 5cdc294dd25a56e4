// The gradient of a convolution's weights in bfloat16, on the tile registers of AMX.
//
// On a grid with one column of zeros behind every row and one row of zeros behind every image, a shift of the image by
// (u, v) pixels is a shift of the flat grid by u * (W + 1) + v. So for each of the k * k taps the gradient is one matrix
// product over all pixels, of the output's gradient and the shifted input, both of which are packed once. oneDNN's own
// reaches a tenth of the tiles' speed for images of 4x4 and 8x8 pixels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

// Whether this processor and system have the tiles, and let this process use them.
bool cm_has_tiles();

// Shapes for which they are worth their while: k of 1 or 3 with k / 2 zeros around, channels in sixteens, and images
// that the cache holds.
bool cm_fits_tiles(const at::Tensor& x, int64_t out_channels, int64_t k);

// x [N, C, H, W] and dy [N, O, H, W], in bfloat16 and channels-last; the result is [O, C, k, k] in float32, channels-last.
at::Tensor cm_weight_grad(const at::Tensor& x, const at::Tensor& dy, int64_t k);
