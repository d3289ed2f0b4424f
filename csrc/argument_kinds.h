// What the arguments of all operators have in common (arguments.h): how each kind of tensor is
// checked, against the leading tensor.
#pragma once

#include "checks.h"
#include "image.h"
#include "overlap.h"
#include "views.h"

namespace densenet_efficient::arguments {

// The norm of channels among which are those that an operator makes, as its caller names it: see
// norm_fold. Nothing where norm is not given.
struct NextNorm {
  const OptionalTensor &stats, &gamma, &beta;
  double eps;
  const OptionalTensor& norm;
};

// The same, checked: of C channels, those that the operator makes from `first` on.
struct FoldedNext {
  Strided stats, gamma, beta, norm;
  double eps = 0.0;
  int64_t C = 0, first = 0;
};

// The leading tensor, x or a table, decides about the dtype and the device of all others.
struct Arguments {
  Arg lead;
  ScalarType arithmetic;  // the dtype of tables and weight gradients

 protected:
  explicit Arguments(const Arg& given)
      : lead(given), arithmetic(arithmetic_of(given)), place_(given.tensor) {}
  Arguments(const Arg& lead, int64_t dim) : Arguments(lead) { check_dim(lead, dim); }

  // The leading tensor's channels, its last dimension.
  int64_t channels(int64_t dim) const {
    const int64_t C = lead.tensor.size(dim - 1);
    if (C == 0) fail(lead, "must have at least one channel, got shape ", shape_text(lead.tensor));
    return C;
  }

  Strided leading_activation() const {
    check_activation_dtype(lead);
    return check_rows(lead);
  }
  Strided activation(const char* name, const Tensor& tensor, const Shape& shape) const {
    return check_rows(checked(name, tensor, shape, lead.tensor.scalar_type()));
  }
  Strided activation(const char* name, const OptionalTensor& tensor, const Shape& shape) const {
    return tensor ? activation(name, *tensor, shape) : Strided{};
  }

  // Per-channel vectors [rows, C] (norm, stats, dnorm, correction): contiguous, except that a table
  // may be a column slice of a wider one.
  Strided table(const char* name, const Tensor& tensor, const Shape& shape) const {
    return check_rows(checked(name, tensor, shape, arithmetic));
  }
  Strided table(const char* name, const OptionalTensor& tensor, const Shape& shape) const {
    return tensor ? table(name, *tensor, shape) : Strided{};
  }
  Strided contiguous(const char* name, const Tensor& tensor, const Shape& shape) const {
    const Arg arg = checked(name, tensor, shape, arithmetic);
    check_contiguous(arg);
    return check_rows(arg);
  }
  Strided contiguous(const char* name, const OptionalTensor& tensor, const Shape& shape) const {
    return tensor ? contiguous(name, *tensor, shape) : Strided{};
  }
  // One whole number of 64 bits.
  const Tensor& counter(const char* name, const Tensor& tensor) const {
    const Arg arg{lead.op, name, tensor};
    if (tensor.numel() != 1) fail(arg, "must be one value, got shape ", shape_text(tensor));
    check_dtype(arg, ScalarType::Long);
    check_device(arg, lead, place_);
    return tensor;
  }

  StridedWeight weight_gradient(const Tensor& tensor, const Shape& shape) const {
    return check_weight_gradient(checked("dweight", tensor, shape, arithmetic));
  }
  StridedWeight weight_gradient(const OptionalTensor& tensor, const Shape& shape) const {
    return tensor ? weight_gradient(*tensor, shape) : StridedWeight{};
  }

  // own [2, K]: the statistics that the operator takes, some columns of those that are folded.
  FoldedNext folded_next(const Strided& own, const NextNorm& next) const {
    if (!next.norm) return {};
    const Arg arg{lead.op, "next_norm", *next.norm};
    if (!own || !next.stats) fail(arg, "needs stats and next_stats");
    check_dim({lead.op, "next_stats", *next.stats}, 2);
    const int64_t C = next.stats->size(1);
    const FoldedNext found{table("next_stats", next.stats, {kStatsRows, C}),
                           contiguous("next_gamma", next.gamma, {C}),
                           contiguous("next_beta", next.beta, {C}),
                           table("next_norm", next.norm, {kNormRows, C}),
                           next.eps,
                           C,
                           columns_between(*own.tensor, *next.stats)};
    const bool inside =
        own.stride == found.stats.stride && found.first >= 0 && found.first + own.channels <= C;
    if (!inside) fail({lead.op, "stats", *own.tensor}, "must be columns of next_stats");
    apart({found.norm}, {found.stats});
    return found;
  }

  // The weight's outputs give the shape it is checked for in its turn. Any layout will do.
  int64_t outputs(const Tensor& weight, int64_t dim) const {
    const Arg arg{lead.op, "weight", weight};
    check_dim(arg, dim);
    const int64_t K = weight.size(0);
    if (K == 0) fail(arg, "must have at least one output, got shape ", shape_text(weight));
    return K;
  }
  const Tensor& checked_weight(const Tensor& weight, const Shape& shape) const {
    return checked("weight", weight, shape, lead.tensor.scalar_type()).tensor;
  }

  // Fails where what is written shares memory with anything else.
  void apart(std::initializer_list<Strided> written, std::initializer_list<Strided> read) const {
    check_apart(lead.op, written, read);
  }
  // Elements from one table's first to another's.
  static int64_t columns_between(const Tensor& to, const Tensor& from) {
    const auto address = [](const Tensor& table) {
      return reinterpret_cast<intptr_t>(table.mutable_data_ptr());
    };
    return (address(to) - address(from)) / static_cast<int64_t>(from.element_size());
  }
  // From a tensor's first element to its last, as one row; no row where it has none.
  static Strided whole(const char* name, const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    return {&tensor, last + 1, tensor.numel() > 0 ? 1 : 0, last + 1, name};
  }
  static Strided whole(const Tensor& weight) { return whole("weight", weight); }

  // [4, C] that a norm's gradient is put into, or added to the first columns of.
  Strided correction_of(const char* name, const Tensor& correction, int64_t C,
                        bool accumulate) const {
    const Arg arg{lead.op, name, correction};
    check_dim(arg, 2);
    const int64_t width = correction.size(1);
    if (accumulate ? width < C : width != C)
      fail(arg, "must have ", accumulate ? "at least " : "", C, " columns, got ", width);
    return table(name, correction, {kCorrectionRows, width});
  }
  Strided correction_of(const char* name, const OptionalTensor& correction, int64_t C,
                        bool accumulate) const {
    return correction ? correction_of(name, *correction, C, accumulate) : Strided{};
  }

  int64_t checked_count(int64_t count) const {
    if (count < 0) fail({lead.op, "count", lead.tensor}, "must not be negative, got ", count);
    return count;
  }

  Arg checked(const char* name, const Tensor& tensor, const Shape& shape, ScalarType dtype) const {
    const Arg arg{lead.op, name, tensor};
    check_shape(arg, shape);
    check_dtype(arg, dtype);
    check_device(arg, lead, place_);
    return arg;
  }

 private:
  Place place_;

  static ScalarType arithmetic_of(const Arg& lead) {
    check_given(lead);
    return lead.tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

// Led by a table.
struct TableArguments : Arguments {
  int64_t C;

  explicit TableArguments(const Arg& lead) : Arguments(lead, 2), C(channels(2)) {
    check_dtype(lead, arithmetic);
  }

 protected:
  // Fails unless `own` columns from `first` on are the table's.
  void check_columns(int64_t first, int64_t own) const {
    if (first < 0 || first > C - own)
      fail(lead, "must have the columns ", first, " to ", first + own, ", has ", C);
  }
};

// Led by x [M, C].
struct RowArguments : Arguments {
  int64_t M, C;

  RowArguments(const char* op, const Tensor& x)
      : Arguments({op, "x", x}, 2), M(x.size(0)), C(channels(2)) {}
};

// Led by x [N, *spatial, C] of one to three spatial dimensions.
struct ImageArguments : Arguments, Image {
  int64_t C;

  ImageArguments(const char* op, const Tensor& x)
      : Arguments({op, "x", x}), Image(image_of(lead)), C(channels(dims + 2)) {}

 protected:
  // [N, *spatial, channels] for the pixels of an image.
  Shape shape(const Image& image, int64_t channels) const {
    Shape found{image.N};
    if (dims > 2) found.add(image.D);
    found.add(image.H);
    if (dims > 1) found.add(image.W);
    found.add(channels);
    return found;
  }
  Shape shape(int64_t channels) const { return shape(*this, channels); }

  // [outputs, C] and the kernel of a convolution over `n` pixels in every direction.
  Shape kernel(int64_t outputs, int64_t n) const {
    Shape found{outputs, C};
    for (int64_t d = 0; d < dims; ++d) found.add(n);
    return found;
  }

 private:
  static Image image_of(const Arg& lead) {
    const Tensor& x = lead.tensor;
    const int64_t dims = x.dim() - 2;
    if (dims < 1 || dims > 3)
      fail(lead, "must have 3, 4 or 5 dimensions, got shape ", shape_text(x));
    const int64_t height = dims > 2 ? 2 : 1;
    return {.dims = dims,
            .N = x.size(0),
            .D = dims > 2 ? x.size(1) : 1,
            .H = x.size(height),
            .W = dims > 1 ? x.size(height + 1) : 1};
  }
};

}  // namespace densenet_efficient::arguments
