// norm_relu_conv3x3, backward: two kernels, each described in its header, and the second pass of
// both.
//   dy  = a_y * dy - p - (y - mean_y) * q where y is given           [N, H, W, K], never written
//   dz  = conv3x3^T(dy, weight) * [a * x + s > 0]                    conv3x3/data_gradient.cuh
//   dweight [K, C, 3, 3] of dy and relu(a * x + s)                   conv3x3/weight_gradient.cuh
//   dnorm = sums of dz * x_hat and dz [2, C]
// One kernel for both would save reading x and dy a second time, a third of the bytes, but its
// accumulators leave room for one block a multiprocessor, and the products, not the bytes, are the
// longer part of this operator.
#include "conv3x3/data_gradient.cuh"
#include "conv3x3/pack_weight.cuh"
#include "conv3x3/weight_gradient.cuh"
#include "reduce/finish.cuh"

namespace densenet_efficient {
namespace {

using Call = arguments::NormReluConv3x3Backward;
using Tiling = tiling::NormReluConv3x3Backward;

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    norm_relu_conv3x3_backward_pack_kernel(PackWeight<T> args) {
  pack_weight(args);
}

__global__ void __launch_bounds__(kSumThreads, 2)
    norm_relu_conv3x3_backward_finish_kernel(SumPartials<float> weight, SumPartials<float> norm) {
  finish_sums<device::kTaps>(weight, norm);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T>
void launch_data_gradient(const Launcher& launcher, const tiling::DataGradient3x3& tiling,
                          const tiling::Images3x3& of, const DataGradient& args, bool accumulate) {
  if (tiling.tile.blocks == 0 || args.channels == 0) return;
  const Images images(tiling.tile, of, tiling.tile.warps());
  const LaunchShape shape{.grid_x = tiling.tile.blocks,
                          .grid_y = tiling.channel_blocks,
                          .block = tiling.tile.threads(),
                          .shared_bytes = tiling.tile.shared_bytes,
                          .tiles = tiling.tile.tiles,
                          .ranges = tiling.tile.blocks};
  const auto launch = [&](auto accumulates, auto shared) {
    launcher.launch<&data_gradient::norm_relu_conv3x3_backward_data_kernel<T, accumulates, shared>>(
        shape, args, images);
  };
  const auto launch_shared = [&](auto accumulates) {
    if (tiling.tile.division.pixels < tiling::kAlone.pixels)
      launch(accumulates, std::true_type{});
    else
      launch(accumulates, std::false_type{});
  };
  if (accumulate)
    launch_shared(std::true_type{});
  else
    launch_shared(std::false_type{});
}

template <typename T, int kDepths>
void launch_weight_gradient(const Launcher& launcher, const LaunchShape& shape,
                            const WeightGradient& args, const Images& images) {
  launcher.launch<&weight_gradient::norm_relu_conv3x3_backward_weight_kernel<T, kDepths>>(
      shape, args, images);
}

template <typename T>
void launch_weight_gradient(const Launcher& launcher, const tiling::WeightGradient3x3& tiling,
                            const tiling::Images3x3& of, const WeightGradient& args) {
  if (tiling.tile.blocks == 0 || args.channels == 0 || args.outputs == 0) return;
  const auto launch = tiling.depths == 1   ? launch_weight_gradient<T, 1>
                      : tiling.depths == 2 ? launch_weight_gradient<T, 2>
                                           : launch_weight_gradient<T, 3>;
  launch(launcher,
         {.grid_x = tiling.tile.blocks * tiling.channel_blocks,
          .grid_y = tiling.output_blocks,
          .block = 96 * tiling.units,
          .shared_bytes = tiling.tile.shared_bytes,
          .tiles = tiling.tile.tiles,
          .ranges = tiling.tile.blocks},
         args, Images(tiling.tile, of, 3 * tiling.units));
}

void norm_relu_conv3x3_backward(Tensor dy, OptionalTensor y, OptionalTensor correction, Tensor x,
                                Tensor norm, Tensor weight, bool accumulate, Tensor dx,
                                OptionalTensor dweight, Tensor dnorm, int64_t count,
                                OptionalTensor x_correction) {
  const Call call(dy, y, correction, x, norm, weight, accumulate, dx, dweight, dnorm, count,
                  x_correction);
  check_two_dimensional(call);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const Launcher launcher(call.lead);
    const tiling::Images3x3 of{call.N, call.H, call.W};
    const Tiling tiling(of, call.C, call.K, sizeof(T), accumulate, needs_packing(weight),
                        dweight.has_value(), launcher.device());
    check_fits(call.lead, tiling.data.tile);
    check_near(call.lead.op, {call.dy, call.y, call.x, call.dx});
    if (dweight) check_fits(call.lead, tiling.weight.tile);
    const Workspace packed(x, tiling.weight_copy_bytes), sums(x, tiling.sums_bytes),
        weights(x, tiling.dweight_bytes);
    const int channels = static_cast<int>(call.C), outputs = static_cast<int>(call.K);
    const OutputGradient gradient{row_tensor(call.dy), row_tensor(call.y),
                                  float_table(call.correction)};
    const device::RowTensor x_rows = row_tensor(call.x),
                            weight_rows =
                                packed_rows<&norm_relu_conv3x3_backward_pack_kernel<T>, T>(
                                    launcher, weight, packed);
    const int copied = outputs > device::kDepth<T> ? device::kPanelChannels<T> : device::kDepth<T>;
    const auto usual = [&](const tiling::Tile3x3& tile, int of_block) {
      return tile.strips == 1 && usual_rows<T>(x_rows) && channels % of_block == 0;
    };
    launch_data_gradient<T>(
        launcher, tiling.data, of,
        {gradient, x_rows, float_table(call.norm), weight_rows, output_row_tensor(call.dx),
         sums.data<float>(), tiling.data.pitch, channels, outputs, copied,
         Eights(device::kTaps * copied, tiling.data.tile.warps()),
         usual(tiling.data.tile, device::kPanelChannels<T>) && usual_rows<T>(weight_rows) &&
             outputs % copied == 0},
        accumulate);
    SumPartials<float> of_weight;
    if (dweight) {
      launch_weight_gradient<T>(
          launcher, tiling.weight, of,
          {gradient, x_rows, float_table(call.norm), weights.data<float>(), tiling.weight.pitch,
           channels, outputs, usual(tiling.weight.tile, 32 * tiling.weight.units),
           tiling.weight.units, static_cast<int>(tiling.weight.channel_blocks),
           tiling.weight.layout(sizeof(T)).offsets()});
      of_weight =
          weight_sums(weights.data<const float>(), tiling.weight.tile.blocks, call.K, call.C,
                      device::kTaps, tiling.weight.pitch, output_rows<float>(call.dweight).data,
                      call.dweight.channel, call.dweight.tap);
    }
    SumPartials<float> of_norm =
        norm_sums(sums.data<const float>(), tiling.data.tile.blocks, call.C, tiling.data.pitch,
                  output_rows<float>(call.dnorm));
    of_norm.correction = correction_of<float>(call, accumulate);
    launch_finish<&norm_relu_conv3x3_backward_finish_kernel, device::kTaps>(launcher, of_weight,
                                                                            of_norm);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv3x3_backward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv3x3_backward));
}
