// norm_relu_conv3x3, backward: two kernels, each described in its header, and the second pass of
// both.
//   dy  = a_y * dy - p - (y - mean_y) * q where y is given           [N, H, W, K], never written
//   dz  = conv3x3^T(dy, weight) * [a * x + s > 0]                    conv3x3/data_gradient.cuh
//   dweight [K, C, 3, 3] of dy and relu(a * x + s)                   conv3x3/weight_gradient.cuh
//   dnorm = sums of dz * x_hat and dz [2, C]
// One kernel for both would save reading x and dy a second time, a third of the bytes, but its
// accumulators leave room for one block a multiprocessor, and the products, not the bytes, are the
// longer part of this stage.
#include "conv3x3/data_gradient.cuh"
#include "conv3x3/pack_weight.cuh"
#include "conv3x3/weight_gradient.cuh"
#include "reduce/finish.cuh"

namespace densenet_efficient {
namespace {

using Call = arguments::NormReluConv3x3Backward;
using workspace::cuda::Tile3x3;

// Fills in the data gradient's partial sums, launches it, and returns how they are added up.
template <typename T>
SumPartials launch_data_gradient(const Launcher& launcher, const Call& call, DataGradient args,
                                 Workspace& partial) {
  const Device& device = launcher.device();
  const int output_panels =
      static_cast<int>(std::max<int64_t>(1, ceil_div(args.outputs, device::kPanelChannels<T>)));
  const auto shared = DataGradientLayout<T>::shared(output_panels, args.accumulate);
  const Tile3x3 tile(call.N, call.H, call.W, shared, device.multiprocessors, device.shared_bytes);
  check_fits(call.lead, tile);
  const int64_t blocks = workspace::cuda::conv3x3_blocks(
      tile.tiles, device.multiprocessors,
      workspace::cuda::resident_blocks(tile.shared_bytes(shared), device.shared_bytes));
  args.pitch = round_up(args.channels, device::kPanelChannels<T>);
  partial = Workspace(call.lead.tensor, blocks * kDnormRows * args.pitch * 4);
  args.partial = partial.data();
  if (blocks > 0 && args.channels > 0) {
    const Images images(tile, call.N, call.H, call.W);
    const LaunchShape shape{blocks, 1, 32 * tile.groups, tile.shared_bytes(shared)};
    if (args.accumulate)
      launcher.launch<&data_gradient::kernel<T, true>>(shape, args, images);
    else
      launcher.launch<&data_gradient::kernel<T, false>>(shape, args, images);
  }
  SumPartials sums;
  sums.partial = args.partial;
  sums.blocks = static_cast<int>(blocks);
  sums.rows = kDnormRows;
  sums.columns = args.channels;
  sums.pitch = args.pitch;
  sums.block_stride = kDnormRows * args.pitch;
  return sums;
}

template <typename T>
SumPartials launch_weight_gradient(const Launcher& launcher, const Call& call, WeightGradient args,
                                   Workspace& partial) {
  const Device& device = launcher.device();
  const workspace::cuda::Conv3x3WeightGradient split(args.channels, args.outputs);
  const auto shared = WeightGradientLayout<T>::shared(split.units, 16 * split.depths);
  // The other blocks of the same tiles fill the device as well.
  const int shares = static_cast<int>(split.channel_blocks * split.output_blocks);
  const Tile3x3 tile(call.N, call.H, call.W, shared, device.multiprocessors / shares,
                     device.shared_bytes);
  check_fits(call.lead, tile);
  const int64_t row_blocks = split.row_blocks(tile.tiles, device.multiprocessors);
  args.units = split.units;
  args.channel_blocks = static_cast<int>(split.channel_blocks);
  args.pitch = split.pitch();
  partial = Workspace(call.lead.tensor, row_blocks * device::kTaps * args.outputs * args.pitch * 4);
  args.partial = partial.data();
  if (row_blocks > 0 && args.channels > 0 && args.outputs > 0) {
    const Images images(tile, call.N, call.H, call.W);
    const LaunchShape shape{row_blocks * split.channel_blocks, split.output_blocks,
                            96 * split.units, tile.shared_bytes(shared)};
    if (split.depths == 1)
      launcher.launch<&weight_gradient::kernel<T, 1>>(shape, args, images);
    else if (split.depths == 2)
      launcher.launch<&weight_gradient::kernel<T, 2>>(shape, args, images);
    else
      launcher.launch<&weight_gradient::kernel<T, 3>>(shape, args, images);
  }
  SumPartials sums;
  sums.partial = args.partial;
  sums.blocks = static_cast<int>(row_blocks);
  sums.rows = args.outputs;
  sums.columns = args.channels;
  sums.pitch = args.pitch;
  sums.block_stride = device::kTaps * args.outputs * args.pitch;
  return sums;
}

void norm_relu_conv3x3_backward(Tensor dy, OptionalTensor y, OptionalTensor correction, Tensor x,
                                Tensor norm, Tensor weight, bool accumulate, Tensor dx,
                                OptionalTensor dweight, Tensor dnorm) {
  const Call call(dy, y, correction, x, norm, weight, dx, dweight, dnorm);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const Launcher launcher(call.lead);
    const WeightRows<T> rows(launcher, weight);
    const int channels = static_cast<int>(call.C), outputs = static_cast<int>(call.K);
    const OutputGradient gradient{row_tensor(call.dy), row_tensor(call.y),
                                  float_table(call.correction)};
    Workspace data_partial, weight_partial;
    SumPartials norm_sums = launch_data_gradient<T>(
        launcher, call,
        {gradient, row_tensor(call.x), float_table(call.norm), rows.rows(),
         output_row_tensor(call.dx), nullptr, 0, channels, outputs, accumulate},
        data_partial);
    const auto sums = output_rows<float>(call.dnorm);
    norm_sums.out = sums.data;
    norm_sums.out_stride = sums.stride;
    SumPartials weight_sums;
    if (dweight) {
      weight_sums = launch_weight_gradient<T>(launcher, call,
                                              {gradient, row_tensor(call.x), float_table(call.norm),
                                               nullptr, 0, channels, outputs, 0, 0},
                                              weight_partial);
      weight_sums.out = output_rows<float>(call.dweight).data;
      weight_sums.out_stride = device::kTaps * call.C;
    }
    sum_partials<device::kTaps>(launcher, weight_sums, norm_sums);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv3x3_backward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv3x3_backward));
}
