// optimizer_update_: a warp takes a block of 8-bit state, or a stretch of a tensor, 256 elements at a time. A block of
// up to 256 is read once; a longer one twice, the first time for its maximum.
#include "optimizer_storage.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kChunk = 32 * kLane;
constexpr int kStretch = 4 * kChunk;  // what a warp takes of a tensor without codes

enum Coefficient { kLength, kDecayed, kRootFactor, kUnit, kStep };

__device__ __forceinline__ double scalar(const void* p, Kind kind) {
  return kind == Kind::f64 ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
}

__device__ __forceinline__ bool stopped(const OptimizerUpdate& args) {
  return args.found_inf != nullptr && scalar(args.found_inf, args.found_inf_kind) != 0.0;
}

// A thread a tensor: its step is one more, and what follows from it.
__global__ void __launch_bounds__(32) optimizer_prepare(const __grid_constant__ OptimizerUpdate args) {
  const int t = threadIdx.x;
  if (t >= args.count || stopped(args)) return;
  const UpdatedTensor& x = args.tensor[t];
  const float step = __fadd_rn(x.step != nullptr ? *x.step : x.host_step, 1.0f);
  if (x.step != nullptr) *x.step = step;
  const Corrections c = corrections(args, step);
  const double rate = args.lr_device != nullptr ? scalar(args.lr_device, args.lr_kind) : args.lr;
  double length = mul(rate, c.factor);
  if (args.ratio != nullptr) length = mul(length, static_cast<double>(args.ratio[x.index]));
  double* out = args.coefficients + static_cast<int64_t>(x.index) * kCoefficients;
  out[kLength] = length;
  out[kDecayed] = sub(1.0, mul(rate, args.weight_decay));
  out[kRootFactor] = c.root_factor;
  out[kUnit] = c.unit;
  out[kStep] = static_cast<double>(step);
}

template <typename W>
struct Tile {
  W param[kLane], direction[kLane], state[kSlots][kLane];
};

template <typename W, bool kCodes>
__device__ __forceinline__ void compute(const OptimizerUpdate& args, const UpdatedTensor& x, const Numbers<W>& n,
                                        const float (&code_steps)[kSlots], bool coupled, W grad_scale, int64_t at,
                                        int count, bool vector, Tile<W>& tile) {
  load_eight(x.param, args.param_kind, at, count, vector, tile.param);
  if (args.extra_kind != Kind::none && sizeof(W) == 4) {
    float extra[kLane];
    load_eight(x.extra, args.extra_kind, at, count, vector, extra);
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const auto p = static_cast<float>(tile.param[i]);
      tile.param[i] = args.extra_kind == Kind::i16
                          ? bits_to_float(float_to_bits(p) + static_cast<uint32_t>(static_cast<int>(extra[i])))
                          : __fadd_rn(p, extra[i]);
    }
  }
  W g[kLane];
  load_eight(x.grad, args.grad_kind, at, count, vector, g);
  if (args.grad_scale != nullptr) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) g[i] = div(g[i], grad_scale);
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (args.state_kind[s] == Kind::none) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) tile.state[s][i] = W(0);
      continue;
    }
    load_eight(x.state[s], args.state_kind[s], at, count, vector, tile.state[s]);
    if constexpr (kCodes) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) tile.state[s][i] = decode(tile.state[s][i], code_steps[s], args.state_kind[s]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    tile.direction[i] = advance(args.rule, args.flags, coupled, n, tile.param[i], g[i], tile.state[0][i],
                                tile.state[1][i], tile.state[2][i]);
  }
}

template <typename W>
__device__ __forceinline__ void write_param(const OptimizerUpdate& args, const UpdatedTensor& x, const W (&v)[kLane],
                                            int64_t at, int64_t place, uint32_t step, int count, bool vector) {
  if constexpr (sizeof(W) == 8) {
    store_wide(x.param, at, count, vector, v);
  } else {
    const bool carries = args.rounding == Rounding::kahan && args.extra_kind != Kind::none;
    if (args.param_kind == Kind::f32) {
      store_wide(x.param, at, count, vector, v);
      if (carries) {
        float left[kLane];
#pragma unroll
        for (int i = 0; i < kLane; ++i) left[i] = __fsub_rn(v[i], v[i]);
        store_wide(x.extra, at, count, vector, left);
      }
      return;
    }
    const bool bf16 = args.param_kind == Kind::bf16;
    uint32_t bits[kLane], left[kLane];
    if (args.rounding == Rounding::stochastic && bf16) {
      random_sixteens(place, step, x.stream, args.seed, bits);
#pragma unroll
      for (int i = 0; i < kLane; ++i) bits[i] = truncate_to_bfloat16(v[i], bits[i]);
    } else if (args.rounding == Rounding::split_master) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const uint32_t raw = float_to_bits(v[i]);
        bits[i] = (raw + 0x8000u) >> 16;
        left[i] = raw & 0xffffu;
      }
      store_sixteens(x.extra, at, count, vector, left);
    } else {
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        bits[i] = bf16 ? float_to_bfloat16(v[i]) : float_to_half(v[i]);
        const float kept = bf16 ? bits_to_float(bits[i] << 16) : half_to_float(static_cast<uint16_t>(bits[i]));
        const float lost = __fsub_rn(v[i], kept);
        left[i] = bf16 ? float_to_bfloat16(lost) : float_to_half(lost);
      }
      if (carries) store_sixteens(x.extra, at, count, vector, left);
    }
    store_sixteens(x.param, at, count, vector, bits);
  }
}

template <typename W, bool kCodes>
__global__ void __launch_bounds__(32 * kWarps, 2) optimizer_kernel(const __grid_constant__ OptimizerUpdate args) {
  if (stopped(args)) return;
  int t = 0;
  while (t + 1 < args.count && args.first_block[t + 1] <= blockIdx.x) ++t;
  const UpdatedTensor& x = args.tensor[t];
  const int64_t block = static_cast<int64_t>(blockIdx.x - args.first_block[t]) * kWarps + threadIdx.x / 32;
  if (block >= x.blocks) return;  // the whole warp leaves, and no barrier follows
  const int64_t row = block / x.blocks_per_row, column = block % x.blocks_per_row * args.block_size;
  const int64_t begin = row * x.columns + column, place = x.start + row * x.row_stride + column;
  const int width = static_cast<int>(min(static_cast<int64_t>(args.block_size), x.columns - column));
  const int chunks = (width + kChunk - 1) / kChunk;
  const int lane = threadIdx.x % 32;

  const double* c = args.coefficients + static_cast<int64_t>(x.index) * kCoefficients;
  const auto step = static_cast<uint32_t>(c[kStep]);
  const Numbers<W> n = {W(args.beta1),     W(sub(1.0, args.beta1)),
                        W(args.beta2),     W(sub(1.0, args.beta2)),
                        W(args.eps),       W(args.weight_decay),
                        W(c[kLength]),     W(c[kDecayed]),
                        W(c[kRootFactor]), W(c[kUnit]),
                        step == 1};
  const bool apart = args.rule == Rule::lion || (args.rule == Rule::adam && (args.flags & kDecoupled));
  const bool coupled = args.decay && !(args.flags & kDecoupled) && args.rule != Rule::lamb && args.rule != Rule::lion;
  const W grad_scale = args.grad_scale != nullptr ? W(scalar(args.grad_scale, args.grad_scale_kind)) : W(1);
  float code_steps[kSlots] = {}, inverse[kSlots] = {};
  uint32_t top[kSlots] = {};
  if constexpr (kCodes) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (args.state_kind[s] != Kind::none) code_steps[s] = code_step(x.scale[s][block], args.state_kind[s]);
    }
  }

  Tile<W> tile;
#pragma unroll 1
  for (int pass = kCodes ? 0 : 1; pass < 2; ++pass) {
    if constexpr (kCodes) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (pass == 0 || args.state_kind[s] == Kind::none) continue;
        const CodeScale found = code_scale(warp_max(top[s]), args.state_kind[s]);
        inverse[s] = found.inverse;
        if (lane == 0) x.scale[s][block] = found.scale;
      }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int first = chunk * kChunk + lane * kLane;
      const int count = max(0, min(kLane, width - first));
      const bool vector = x.vector && count == kLane;
      const int64_t at = begin + first;
      if (pass == 0 || !kCodes || chunks > 1) {
        compute<W, kCodes>(args, x, n, code_steps, coupled, grad_scale, at, count, vector, tile);
      }
      if (kCodes && pass == 0) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
#pragma unroll
          for (int i = 0; i < kLane; ++i) {
            const float size = code_size(static_cast<float>(tile.state[s][i]), args.state_kind[s]);
            if (i < count) top[s] = max(top[s], float_to_bits(size) & 0x7fffffffu);
          }
        }
        continue;
      }
      const uint32_t dither = dither_base(step, x.stream, args.seed) + static_cast<uint32_t>(place + first) * kWeyl;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const Kind kind = args.state_kind[s];
        if (kind == Kind::none) continue;
        if constexpr (kCodes) {
          uint32_t code[kLane];
#pragma unroll
          for (int i = 0; i < kLane; ++i) {
            code[i] = encode(static_cast<float>(tile.state[s][i]), inverse[s], dither + i * kWeyl, kind);
          }
          store_codes(x.state[s], at, count, vector, code);
        } else if (kind == Kind::bf16) {
          uint32_t bits[kLane];
#pragma unroll
          for (int i = 0; i < kLane; ++i) {
            bits[i] = truncate_to_bfloat16(static_cast<float>(tile.state[s][i]), (dither + i * kWeyl) >> 16);
          }
          store_sixteens(x.state[s], at, count, vector, bits);
        } else {
          store_wide(x.state[s], at, count, vector, tile.state[s]);
        }
      }
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const W kept = apart && args.decay ? mul(tile.param[i], n.decayed) : tile.param[i];
        tile.param[i] = sub(kept, mul(tile.direction[i], n.length));
      }
      write_param(args, x, tile.param, at, place + first, step, count, vector);
    }
  }
}

}  // namespace

const char* device_address(const void* host, void** device) { return mapped_address(host, device); }

const char* optimizer_update(OptimizerUpdate& args, void* stream) {
  const bool codes = args.state_kind[0] == Kind::i8 || args.state_kind[0] == Kind::u8;
  if (!codes) args.block_size = kStretch;
  int64_t blocks = 0;
  for (int t = 0; t < args.count; ++t) {
    UpdatedTensor& x = args.tensor[t];
    if (x.step == nullptr && is_capturing(stream))
      return "the steps are on the host, where a captured graph cannot count";
    x.blocks_per_row = ceil_div(x.columns, args.block_size);
    x.blocks = x.rows * x.blocks_per_row;
    args.first_block[t] = static_cast<uint32_t>(blocks);
    blocks += ceil_div(x.blocks, kWarps);
    if (blocks > 0x7fffffffLL) return "the tensors need more thread blocks than one launch can have";
  }
  const char* error = launch(optimizer_prepare, 1, 1, 32, 0, stream, args);
  if (error != nullptr || blocks == 0) return error;
  if (args.param_kind == Kind::f64) {
    if (codes) return "float64 parameters have no 8-bit state here";
    return launch(optimizer_kernel<double, false>, blocks, 1, 32 * kWarps, 0, stream, args);
  }
  return codes ? launch(optimizer_kernel<float, true>, blocks, 1, 32 * kWarps, 0, stream, args)
               : launch(optimizer_kernel<float, false>, blocks, 1, 32 * kWarps, 0, stream, args);
}

}  // namespace pykernels::cuda
