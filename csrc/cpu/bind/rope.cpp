#include "../../launchers/rope.h"

#include <optional>
#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "rope";

// One of q and k: read where it lies unless its last stride is not 1.
struct Turned {
  Tensor x;
  Tensor out;
  RopeTensor args;

  explicit Turned(const Tensor& given)
      : x(given.size(3) <= 1 || given.stride(3) == 1 ? given : torch::stable::contiguous(given)),
        out(empty_result({given.sizes().begin(), given.sizes().end()}, given.scalar_type())) {
    args.x = x.const_data_ptr();
    args.batch_stride = x.stride(0);
    args.seq_stride = x.stride(1);
    args.head_stride = x.stride(2);
    args.heads = x.size(2);
    args.out = out.mutable_data_ptr();
  }
};

void check_key(const Tensor& k, const Tensor& q) {
  check_dtype(kOp, "k", k, q.scalar_type());
  STD_TORCH_CHECK(k.is_cpu(), kOp, ": expected k to be on the CPU, as q is");
  STD_TORCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3), kOp,
                  ": expected k to have shape [", q.size(0), ", ", q.size(1), ", heads, ", q.size(3),
                  "], with the sizes of q, got ", shape_name(k.sizes()));
}

// A table [rows, pairs] with stride 1 inside a row.
Tensor check_table(const char* name, const Tensor& table) {
  check_float(kOp, name, table);
  STD_TORCH_CHECK(table.is_cpu(), kOp, ": expected ", name, " to be on the CPU, as q is");
  STD_TORCH_CHECK(table.dim() == 2, kOp, ": expected ", name, " to have 2 dimensions, got ", table.dim());
  return table.size(1) <= 1 || table.stride(1) == 1 ? table : torch::stable::contiguous(table);
}

Tensor check_position_ids(const Tensor& ids, int64_t B, int64_t S, int64_t rows) {
  check_dtype(kOp, "position_ids", ids, ScalarType::Long);
  STD_TORCH_CHECK(ids.is_cpu(), kOp, ": expected position_ids to be on the CPU, as q is");
  const bool shared = ids.dim() == 1 && ids.size(0) == S;
  STD_TORCH_CHECK(shared || (ids.dim() == 2 && ids.size(0) == B && ids.size(1) == S), kOp,
                  ": expected position_ids to have shape [", S, "] or [", B, ", ", S, "], got ",
                  shape_name(ids.sizes()));
  const Tensor values = torch::stable::contiguous(ids);
  const int64_t* value = static_cast<const int64_t*>(values.const_data_ptr());
  for (int64_t i = 0; i < values.numel(); ++i)
    STD_TORCH_CHECK(value[i] >= 0 && value[i] < rows, kOp, ": expected position_ids to be from 0 to ", rows - 1,
                    ", the rows of cos, got ", value[i]);
  return values;
}

std::tuple<Tensor, Tensor> rope_cpu(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos,
                                    const Tensor& sin, const std::optional<Tensor>& position_ids, bool interleaved,
                                    bool inverse) {
  check_float(kOp, "q", q);
  STD_TORCH_CHECK(q.dim() == 4, kOp, ": expected q to have 4 dimensions, got ", q.dim());
  const int64_t B = q.size(0), S = q.size(1), D = q.size(3);
  if (k.has_value()) check_key(*k, q);
  const Tensor cosines = check_table("cos", cos), sines = check_table("sin", sin);
  STD_TORCH_CHECK(2 * cos.size(1) <= D, kOp, ": expected cos to have at most ", D / 2,
                  " columns, one for each pair of the head dimension ", D, ", got shape ", shape_name(cos.sizes()));
  STD_TORCH_CHECK(sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && sin.scalar_type() == cos.scalar_type(),
                  kOp, ": expected sin to have the shape and dtype of cos, ", shape_name(cos.sizes()), " ",
                  dtype_name(cos.scalar_type()), ", got ", shape_name(sin.sizes()), " ", dtype_name(sin.scalar_type()));

  Rope args;
  std::optional<Tensor> ids;
  if (position_ids.has_value()) {
    ids = check_position_ids(*position_ids, B, S, cos.size(0));
    args.position_ids = static_cast<const int64_t*>(ids->const_data_ptr());
    args.ids_stride = ids->dim() == 2 ? S : 0;
  } else {
    STD_TORCH_CHECK(cos.size(0) >= S, kOp, ": expected cos to have a row for each of the ", S, " positions of q, got ",
                    cos.size(0));
  }
  const Turned query(q);
  std::optional<Turned> key;
  if (k.has_value()) key.emplace(*k);
  args.q = query.args;
  if (key.has_value()) args.k = key->args;
  args.dtype = float_dtype(q.scalar_type());
  args.S = S;
  args.D = D;
  args.pairs = cos.size(1);
  args.cos = cosines.const_data_ptr();
  args.sin = sines.const_data_ptr();
  args.table_dtype = float_dtype(cos.scalar_type());
  args.cos_stride = cosines.stride(0);
  args.sin_stride = sines.stride(0);
  args.interleaved = interleaved;
  args.inverse = inverse;
  const int64_t width = (args.q.heads + args.k.heads) * D;
  args.stream = worth_streaming(query.out, D) && (!key.has_value() || on_lines(key->out, D));
  torch::stable::parallel_for(0, B * S, grain_of(width), [&](int64_t begin, int64_t end) { rope(args, begin, end); });
  return {query.out, key.has_value() ? key->out : empty_cpu({0}, q.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("rope", TORCH_BOX(&rope_cpu)); }

}  // namespace pykernels::cpu
