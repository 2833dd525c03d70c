// Which kernel serves int8_matmul on the current device: checks, then the heuristic, then the launcher.
#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "choose.h"
#include "launch.h"

namespace pykernels::cuda::hopper {
namespace {

struct Device {
  int index = 0;
  int capability = 0;  // 90 is sm_90
  int multiprocessors = 0;
};

// Asked of CUDA once for each device: a product for one token has no time to ask again.
Device current_device() {
  static std::array<std::atomic<int>, 64> known{};
  Device device;
  cudaGetDevice(&device.index);
  const bool remembered = device.index < static_cast<int>(known.size());
  int packed = remembered ? known[device.index].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int major = 0, minor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index);
    packed = (10 * major + minor) << 16 | count;
    if (remembered) known[device.index].store(packed, std::memory_order_relaxed);
  }
  device.capability = packed >> 16;
  device.multiprocessors = packed & 0xffff;
  return device;
}

int64_t width(DType dtype) { return dtype == DType::f32 || dtype == DType::i32 ? 4 : 2; }

bool on_16_bytes(const void* p, int64_t stride_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (stride_bytes % 16 == 0 || rows == 1);
}

// What TMA asks of pointers and strides; is_legal() has asked the sizes.
bool tma_can_address(const Int8Matmul& p) {
  const Epilogue& e = p.epilogue;
  const int64_t out = width(e.out_dtype);
  // The residual travels as words of the result's width.
  const bool residual = e.residual == nullptr ||
                        (width(e.residual_dtype) == out && on_16_bytes(e.residual, e.residual_stride * out, p.m));
  return on_16_bytes(p.a, p.a_stride, p.m) && on_16_bytes(p.b, p.b_stride, p.n) &&
         on_16_bytes(e.out, e.out_stride * out, p.m) && residual;
}

// Calls f with the member as a type.
template <typename F>
auto with_member(Schedule schedule, F f) {
  switch (schedule) {
    case Schedule::tile_64x64:
      return f(Member<Schedule::tile_64x64>{});
    case Schedule::tile_64x128:
      return f(Member<Schedule::tile_64x128>{});
    case Schedule::tile_128x128:
      return f(Member<Schedule::tile_128x128>{});
    case Schedule::tile_128x256:
      return f(Member<Schedule::tile_128x256>{});
    default:
      return f(Member<Schedule::stream_128x128>{});
  }
}

}  // namespace

Plan plan_int8_matmul(const Int8Matmul& p) {
  const Device device = current_device();
  Plan plan;
  plan.device = device.index;
  plan.multiprocessors = device.multiprocessors;
  if (p.m <= kSmallM) {
    plan.schedule = Schedule::small_m;
  } else if (device.capability == 90 && tma_can_address(p)) {
    plan.schedule = choose(p.m, p.n, p.k, device.multiprocessors, width(p.epilogue.out_dtype));
  }
  if (shape_of(plan.schedule).stream_k) {
    plan.workspace_bytes = with_member(plan.schedule, [&](auto member) {
      return decltype(member)::workspace_bytes(p, plan.device, plan.multiprocessors);
    });
  }
  return plan;
}

const char* int8_matmul(const Int8Matmul& p, const Plan& plan, void* workspace, void* stream) {
  if (plan.schedule == Schedule::small_m) return int8_matmul_small_m(p, stream);
  if (plan.schedule == Schedule::mma_sync) return int8_matmul_tiled(p, stream);
  return with_member(plan.schedule, [&](auto member) {
    return decltype(member)::launch(p, plan.device, plan.multiprocessors, workspace, stream);
  });
}

}  // namespace pykernels::cuda::hopper
