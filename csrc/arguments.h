// The arguments of every operator, checked once for both backends: a launcher constructs its
// operator's struct, which holds the sizes and where the rows of each tensor lie. Members are in
// the order of the checks; ops.cpp says what the tensors are.
#pragma once

#include <vector>

#include "argument_kinds.h"

namespace densenet_efficient::arguments {

struct ChannelStats : RowArguments {
  Strided x, stats;

  ChannelStats(const Tensor& x, const Tensor& stats)
      : RowArguments("channel_stats", x),
        x(leading_activation()),
        stats(table("stats", stats, {kStatsRows, C})) {
    apart({this->stats}, {this->x});
  }
};

struct NormFold : TableArguments {
  Strided stats, gamma, beta, norm;

  NormFold(const Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
           const Tensor& norm)
      : TableArguments({"norm_fold", "stats", stats}),
        stats(table("stats", stats, {kStatsRows, C})),
        gamma(contiguous("gamma", gamma, {C})),
        beta(contiguous("beta", beta, {C})),
        norm(table("norm", norm, {kNormRows, C})) {
    apart({this->norm}, {this->stats, this->gamma, this->beta});
  }
};

struct NormFoldAll : TableArguments {
  struct Norm {
    Strided gamma, beta;
    int64_t first, place;
  };
  std::vector<Norm> each;
  Strided table, norms;

  NormFoldAll(const Tensor& table, const std::vector<Tensor>& gammas,
              const std::vector<Tensor>& betas, const std::vector<int64_t>& first,
              const Tensor& norms)
      : TableArguments({"norm_fold_all", "table", table}),
        table(Arguments::table("table", table, {kStatsRows, C})) {
    const size_t count = gammas.size();
    if (betas.size() != count || first.size() != count)
      fail(lead, "and the lists must be of equally many norms, got ", count, " gammas, ",
           betas.size(), " betas, ", first.size(), " first");
    int64_t place = 0;
    each.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      check_dim({lead.op, "gammas", gammas[i]}, 1);
      const int64_t own = gammas[i].size(0);
      check_columns(first[i], own);
      each.push_back({contiguous("gammas", gammas[i], {own}), contiguous("betas", betas[i], {own}),
                      first[i], place});
      place += (kNormRows * own + 3) / 4 * 4;
    }
    this->norms = contiguous("norms", norms, {place});
    apart({this->norms}, {this->table});
    for (const Norm& norm : each) apart({this->norms}, {norm.gamma, norm.beta});
  }
};

struct RunningUpdate : TableArguments {
  struct Norm {
    Strided mean, variance;
    const Tensor* batches;
    int64_t first;
  };
  Strided table;
  std::vector<Norm> norms;

  RunningUpdate(const Tensor& table, const std::vector<Tensor>& means,
                const std::vector<Tensor>& variances, const std::vector<Tensor>& batches,
                const std::vector<int64_t>& first)
      : TableArguments({"running_update", "table", table}),
        table(Arguments::table("table", table, {kStatsRows, C})) {
    const size_t count = means.size();
    if (variances.size() != count || batches.size() != count || first.size() != count)
      fail(lead, "and the lists must be of equally many norms, got ", count, " means, ",
           variances.size(), " variances, ", batches.size(), " batches, ", first.size(), " first");
    norms.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      check_dim({lead.op, "means", means[i]}, 1);
      const int64_t own = means[i].size(0);
      check_columns(first[i], own);
      norms.push_back({contiguous("means", means[i], {own}),
                       contiguous("variances", variances[i], {own}),
                       &counter("batches", batches[i]), first[i]});
      apart({norms.back().mean, norms.back().variance}, {this->table});
    }
  }
};

struct NormCorrection : TableArguments {
  Strided norm, dnorm, correction;
  int64_t count;

  // accumulate: correction may have more columns.
  NormCorrection(const Tensor& dnorm, const Tensor& norm, int64_t count, bool accumulate,
                 const Tensor& correction)
      : TableArguments({"norm_correction", "norm", norm}),
        norm(table("norm", norm, {kNormRows, C})),
        dnorm(table("dnorm", dnorm, {kDnormRows, C})),
        correction(correction_of("correction", correction, C, accumulate)),
        count(checked_count(count)) {
    apart({this->correction}, {this->norm, this->dnorm});
  }
};

struct NormCorrectionApply : RowArguments {
  Strided x, dx, correction;

  NormCorrectionApply(const Tensor& dx, const Tensor& x, const Tensor& correction)
      : RowArguments("norm_correction_apply", x),
        x(leading_activation()),
        dx(activation("dx", dx, {M, C})),
        correction(table("correction", correction, {kCorrectionRows, C})) {
    apart({this->dx}, {this->x, this->correction});
  }
};

struct NormReluConv1x1Forward : RowArguments {
  int64_t K;
  Strided x, norm;
  const Tensor& weight;
  Strided y, stats;
  FoldedNext next;

  NormReluConv1x1Forward(const Tensor& x, const Tensor& norm, const Tensor& weight, const Tensor& y,
                         const OptionalTensor& stats, const NextNorm& next)
      : RowArguments("norm_relu_conv1x1_forward", x),
        K(outputs(weight, 2)),
        x(leading_activation()),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, {K, C})),
        y(activation("y", y, {M, K})),
        stats(table("stats", stats, {kStatsRows, K})),
        next(folded_next(this->stats, next)) {
    apart({this->y, this->stats, this->next.norm},
          {this->x, this->norm, whole(weight), this->next.gamma, this->next.beta});
  }
};

struct NormReluConv1x1Backward : RowArguments {
  int64_t K;
  Strided x, dz_y, y, correction, norm;
  const Tensor& weight;
  Strided dx, dweight, dnorm;
  int64_t count;
  Strided x_correction;

  NormReluConv1x1Backward(const Tensor& dz_y, const Tensor& y, const Tensor& correction,
                          const Tensor& x, const Tensor& norm, const Tensor& weight,
                          const Tensor& dx, const OptionalTensor& dweight, const Tensor& dnorm,
                          int64_t count, const OptionalTensor& x_correction)
      : RowArguments("norm_relu_conv1x1_backward", x),
        K(outputs(weight, 2)),
        x(leading_activation()),
        dz_y(activation("dz_y", dz_y, {M, K})),
        y(activation("y", y, {M, K})),
        correction(table("correction", correction, {kCorrectionRows, K})),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, {K, C})),
        dx(activation("dx", dx, {M, C})),
        dweight(contiguous("dweight", dweight, {K, C})),
        dnorm(table("dnorm", dnorm, {kDnormRows, C})),
        count(checked_count(count)),
        x_correction(correction_of("x_correction", x_correction, C, true)) {
    apart({this->dx, this->dweight, this->dnorm, this->x_correction},
          {this->x, this->dz_y, this->y, this->correction, this->norm, whole(weight)});
  }
};

struct NormReluConv3x3Forward : ImageArguments {
  int64_t K;
  Strided x, norm;
  const Tensor& weight;
  Strided y, stats;
  FoldedNext next;

  NormReluConv3x3Forward(const Tensor& x, const Tensor& norm, const Tensor& weight, const Tensor& y,
                         const OptionalTensor& stats, const NextNorm& next)
      : ImageArguments("norm_relu_conv3x3_forward", x),
        K(outputs(weight, dims + 2)),
        x(leading_activation()),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, kernel(K, 3))),
        y(activation("y", y, shape(K))),
        stats(table("stats", stats, {kStatsRows, K})),
        next(folded_next(this->stats, next)) {
    apart({this->y, this->stats, this->next.norm},
          {this->x, this->norm, whole(weight), this->next.gamma, this->next.beta});
  }
};

struct NormReluConv3x3Backward : ImageArguments {
  int64_t K;
  Strided x, dy, y, correction, norm;
  const Tensor& weight;
  Strided dx;
  StridedWeight dweight;
  Strided dnorm;
  int64_t count;
  Strided x_correction;

  NormReluConv3x3Backward(const Tensor& dy, const OptionalTensor& y,
                          const OptionalTensor& correction, const Tensor& x, const Tensor& norm,
                          const Tensor& weight, bool accumulate, const Tensor& dx,
                          const OptionalTensor& dweight, const Tensor& dnorm, int64_t count,
                          const OptionalTensor& x_correction)
      : ImageArguments("norm_relu_conv3x3_backward", x),
        K(outputs(weight, dims + 2)),
        x(leading_activation()),
        dy(activation("dy", dy, shape(K))),
        y(given_with(correction, y)),
        correction(table("correction", correction, {kCorrectionRows, K})),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, kernel(K, 3))),
        dx(activation("dx", dx, shape(C))),
        dweight(weight_gradient(dweight, kernel(K, 3))),
        dnorm(table("dnorm", dnorm, {kDnormRows, C})),
        count(checked_count(count)),
        x_correction(correction_of("x_correction", x_correction, C, accumulate)) {
    apart({this->dx, this->dweight, this->dnorm, this->x_correction},
          {this->x, this->dy, this->y, this->correction, this->norm, whole(weight)});
  }

 private:
  Strided given_with(const OptionalTensor& correction, const OptionalTensor& y) const {
    if (y.has_value() != correction.has_value())
      fail({lead.op, "y", lead.tensor}, "and correction must be given together");
    return activation("y", y, shape(K));
  }
};

struct TransitionForward : ImageArguments {
  int64_t K;
  Strided x, norm;
  const Tensor& weight;
  Strided y, stats;

  TransitionForward(const Tensor& x, const Tensor& norm, const Tensor& weight, const Tensor& y,
                    const OptionalTensor& stats)
      : ImageArguments("transition_forward", x),
        K(outputs(weight, 2)),
        x(leading_activation()),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, {K, C})),
        y(activation("y", y, shape(halved(), K))),
        stats(table("stats", stats, {kStatsRows, K})) {
    apart({this->y, this->stats}, {this->x, this->norm, whole(weight)});
  }
};

struct TransitionBackward : ImageArguments {
  int64_t K;
  Strided x, dy, norm;
  const Tensor& weight;
  int64_t count;
  Strided dx, dweight, dnorm;

  TransitionBackward(const Tensor& dy, const Tensor& x, const Tensor& norm, const Tensor& weight,
                     int64_t count, const Tensor& dx, const OptionalTensor& dweight,
                     const Tensor& dnorm)
      : ImageArguments("transition_backward", x),
        K(outputs(weight, 2)),
        x(leading_activation()),
        dy(activation("dy", dy, shape(halved(), K))),
        norm(table("norm", norm, {kNormRows, C})),
        weight(checked_weight(weight, {K, C})),
        count(checked_count(count)),
        dx(activation("dx", dx, shape(C))),
        dweight(contiguous("dweight", dweight, {K, C})),
        dnorm(table("dnorm", dnorm, {kDnormRows, C})) {
    apart({this->dx, this->dweight, this->dnorm}, {this->x, this->dy, this->norm, whole(weight)});
  }
};

struct StemForward : ImageArguments {
  Strided x, norm, y, stats;

  StemForward(const Tensor& x, const Tensor& norm, const Tensor& y, const OptionalTensor& stats)
      : ImageArguments("stem_forward", x),
        x(leading_activation()),
        norm(table("norm", norm, {kNormRows, C})),
        y(activation("y", y, shape(halved_up(), C))),
        stats(table("stats", stats, {kStatsRows, C})) {
    apart({this->y, this->stats}, {this->x, this->norm});
  }
};

struct StemBackward : ImageArguments {
  Strided x, dy, norm;
  int64_t count;
  Strided dx, dnorm;

  StemBackward(const Tensor& dy, const Tensor& x, const Tensor& norm, int64_t count,
               const Tensor& dx, const Tensor& dnorm)
      : ImageArguments("stem_backward", x),
        x(leading_activation()),
        dy(activation("dy", dy, shape(halved_up(), C))),
        norm(table("norm", norm, {kNormRows, C})),
        count(checked_count(count)),
        dx(activation("dx", dx, shape(C))),
        dnorm(table("dnorm", dnorm, {kDnormRows, C})) {
    apart({this->dx, this->dnorm}, {this->x, this->dy, this->norm});
  }
};

// The stem's convolution, 7 x 7 with stride 2, of images in any layout. What has y's pixels decides
// about the dtype; x and the weight may be float32 instead.
struct StemConv : ImageArguments {
 protected:
  static constexpr int64_t kMostChannels = 4, kMostStep = int64_t(1) << 28;

  StemConv(const char* op, const Tensor& x) : ImageArguments(op, x) {
    if (dims != 2) fail(lead, "must have 4 dimensions, got shape ", shape_text(x));
    if (C > kMostChannels)
      fail(lead, "must have at most ", kMostChannels, " channels, got shape ", shape_text(x));
    if (x.stride(2) > kMostStep)
      fail(lead, "must have pixels at most ", kMostStep, " elements apart, got ", x.stride(2));
  }

  // y or dy.
  Strided output(const char* name, const Tensor& tensor, int64_t K) const {
    const Arg arg{lead.op, name, tensor};
    check_given(arg);
    const ScalarType dtype = tensor.scalar_type();
    if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
      fail(arg, "must be bfloat16 or float16, got ", dtype_text(dtype));
    check_operand(lead, arg);
    return check_rows(checked(name, tensor, shape(halved_up(), K), dtype));
  }
  const Tensor& operand(const char* name, const Tensor& tensor, const Shape& shape,
                        const Strided& output) const {
    const Arg arg = checked(name, tensor, shape, tensor.scalar_type());
    check_operand(arg, {lead.op, output.name, *output.tensor});
    return tensor;
  }

 private:
  static void check_operand(const Arg& arg, const Arg& output) {
    const ScalarType dtype = arg.tensor.scalar_type(), expected = output.tensor.scalar_type();
    if (dtype != expected && dtype != ScalarType::Float)
      fail(arg, "must be ", dtype_text(expected), " as ", output.name, " or float32, got ",
           dtype_text(dtype));
  }
};

struct StemConvForward : StemConv {
  int64_t K;
  Strided y;
  const Tensor& weight;

  StemConvForward(const Tensor& x, const Tensor& weight, const Tensor& y)
      : StemConv("stem_conv_forward", x),
        K(outputs(weight, 4)),
        y(output("y", y, K)),
        weight(operand("weight", weight, kernel(K, 7), this->y)) {
    apart({this->y}, {whole("x", x), whole("weight", weight)});
  }
};

struct StemConvBackwardWeight : StemConv {
  int64_t K;
  Strided dy;
  StridedWeight dweight;

  StemConvBackwardWeight(const Tensor& dy, const Tensor& x, const Tensor& dweight)
      : StemConv("stem_conv_backward_weight", x),
        K(channels_of("dy", dy)),
        dy(output("dy", dy, K)),
        dweight(weight_gradient(dweight, kernel(K, 7))) {
    apart({this->dweight}, {this->dy, whole("x", x)});
  }

 private:
  int64_t channels_of(const char* name, const Tensor& tensor) const {
    const Arg arg{lead.op, name, tensor};
    check_dim(arg, 4);
    if (tensor.size(3) == 0)
      fail(arg, "must have at least one channel, got shape ", shape_text(tensor));
    return tensor.size(3);
  }
};

}  // namespace densenet_efficient::arguments
