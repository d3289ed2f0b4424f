// Sizes of what the matrix products keep in shared memory: what a tiling must know of it. How it
// lies there is the business of gemm/panel.cuh and gemm/epilogue.cuh. `size`: bytes of an element.
#pragma once

namespace densenet_efficient::tiling {

constexpr int kPanelRowBytes = 64;  // of channels, in each row of a panel
constexpr int panel_channels(int size) { return kPanelRowBytes / size; }
constexpr int panels(int channels, int size) {
  return (channels + panel_channels(size) - 1) / panel_channels(size);
}

// Scale and shift of a panel's channels, in float32.
constexpr int scale_shift_bytes(int size) { return 2 * panel_channels(size) * 4; }

// Of a warp: 32 rows of one panel, on their way out; mean and M2 of its columns, and their count.
constexpr int kStagingBytes = 32 * kPanelRowBytes;
constexpr int warp_moment_bytes(int columns) { return 4 * (2 * columns + 1); }

}  // namespace densenet_efficient::tiling
