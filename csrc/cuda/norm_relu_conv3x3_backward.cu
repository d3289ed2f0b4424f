// norm_relu_conv3x3, backward: two kernels, each described in its header, and the second pass of
// both.
//   dy  = a_y * dy - p - (y - mean_y) * q where y is given           [N, H, W, K], never written
//   dz  = conv3x3^T(dy, weight) * [a * x + s > 0]                    conv3x3_data_gradient.cuh
//   dweight [K, C, 3, 3] of dy and relu(a * x + s)                   conv3x3_weight_gradient.cuh
//   dnorm = sums of dz * x_hat and dz [2, C]
// One kernel for both would save reading x and dy a second time, a third of the bytes, but its
// accumulators leave room for one block a multiprocessor, and the products, not the bytes, are the
// longer part of this stage.
#include "conv3x3_data_gradient.cuh"
#include "conv3x3_weight_gradient.cuh"
#include "partials.cuh"
#include "weight3x3.cuh"

namespace densenet_efficient {
namespace {

using workspace::cuda::Tile3x3;

// Fills in the data gradient's partial sums, launches it, and returns how they are added up.
template <typename T>
SumPartials launch_data_gradient(const Launcher& launcher, const Arg& x, DataGradient args,
                                 Workspace& partial) {
  const Device& device = launcher.device();
  const int output_panels =
      static_cast<int>(std::max<int64_t>(1, ceil_div(args.outputs, device::kPanelChannels)));
  const auto shared = DataGradientLayout::shared(output_panels, args.accumulate);
  const Tile3x3 tile(x.tensor.size(0), x.tensor.size(1), x.tensor.size(2), shared,
                     device.multiprocessors, device.shared_bytes);
  check_fits(x, tile);
  const int64_t blocks = workspace::cuda::conv3x3_blocks(
      tile.tiles, device.multiprocessors,
      workspace::cuda::resident_blocks(tile.shared_bytes(shared), device.shared_bytes));
  args.pitch = round_up(args.channels, device::kPanelChannels);
  partial = Workspace(x.tensor, blocks * kDnormRows * args.pitch * 4);
  args.partial = partial.data();
  if (blocks > 0 && args.channels > 0) {
    const Images images(tile, x.tensor.size(0), x.tensor.size(1), x.tensor.size(2));
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
SumPartials launch_weight_gradient(const Launcher& launcher, const Arg& x, WeightGradient args,
                                   Workspace& partial) {
  const Device& device = launcher.device();
  const workspace::cuda::Conv3x3WeightGradient split(args.channels, args.outputs);
  const auto shared = WeightGradientLayout::shared(split.panels, (split.depths + 1) / 2);
  // The other blocks of the same tiles fill the device as well.
  const int shares = static_cast<int>(split.channel_blocks * split.output_blocks);
  const Tile3x3 tile(x.tensor.size(0), x.tensor.size(1), x.tensor.size(2), shared,
                     device.multiprocessors / shares, device.shared_bytes);
  check_fits(x, tile);
  const int64_t row_blocks = split.row_blocks(tile.tiles, device.multiprocessors);
  args.panels = split.panels;
  args.channel_blocks = static_cast<int>(split.channel_blocks);
  args.pitch = split.pitch();
  partial = Workspace(x.tensor, row_blocks * device::kTaps * args.outputs * args.pitch * 4);
  args.partial = partial.data();
  if (row_blocks > 0 && args.channels > 0 && args.outputs > 0) {
    const Images images(tile, x.tensor.size(0), x.tensor.size(1), x.tensor.size(2));
    const LaunchShape shape{row_blocks * split.channel_blocks, split.output_blocks,
                            96 * split.panels, tile.shared_bytes(shared)};
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
  const char* op = "norm_relu_conv3x3_backward";
  check_dim({op, "x", x}, 4);
  check_dim({op, "weight", weight}, 4);
  const int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), K = weight.size(0);
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t dy_stride = check_activation({op, "dy", dy}, {N, H, W, K}, x, "x");
  if (y.has_value() != correction.has_value())
    fail({op, "correction", x}, "must be given together with y");
  OutputGradient gradient{row_tensor(dy, dy_stride), {nullptr, 0, 0}, {nullptr, 0}};
  if (y) {
    gradient.y = row_tensor(*y, check_activation({op, "y", *y}, {N, H, W, K}, x, "x"));
    gradient.correction =
        float_table(*correction, check_table({op, "correction", *correction}, kCorrectionRows, K,
                                             ScalarType::Float, x, "x"));
  }
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, C, ScalarType::Float, x, "x");
  check_shape({op, "weight", weight}, {K, C, 3, 3});
  check_dtype({op, "weight", weight}, x.scalar_type());
  check_device({op, "weight", weight}, x, "x");
  const int64_t dx_stride = check_activation({op, "dx", dx}, {N, H, W, C}, x, "x");
  if (dweight) {
    check_shape({op, "dweight", *dweight}, {K, C, 3, 3});
    check_dtype({op, "dweight", *dweight}, ScalarType::Float);
    check_device({op, "dweight", *dweight}, x, "x");
    check_contiguous({op, "dweight", *dweight});
  }
  const int64_t dnorm_stride =
      check_table({op, "dnorm", dnorm}, kDnormRows, C, ScalarType::Float, x, "x");
  const int channels = static_cast<int>(C), outputs = static_cast<int>(K);
  const Arg x_arg{op, "x", x};
  dispatch_16bit(x_arg, [&]<typename T>(T) {
    const Launcher launcher(op, x);
    const WeightRows rows(launcher, weight);
    Workspace data_partial, weight_partial;
    SumPartials norm_sums = launch_data_gradient<T>(
        launcher, x_arg,
        {gradient, row_tensor(x, x_stride), float_table(norm, norm_stride), rows.rows(),
         row_tensor(dx, dx_stride), nullptr, 0, channels, outputs, accumulate},
        data_partial);
    norm_sums.out = static_cast<float*>(dnorm.mutable_data_ptr());
    norm_sums.out_stride = dnorm_stride;
    SumPartials weight_sums;
    if (dweight) {
      weight_sums = launch_weight_gradient<T>(
          launcher, x_arg,
          {gradient, row_tensor(x, x_stride), float_table(norm, norm_stride), nullptr, 0, channels,
           outputs, 0, 0},
          weight_partial);
      weight_sums.out = static_cast<float*>(dweight->mutable_data_ptr());
      weight_sums.out_stride = device::kTaps * C;
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
