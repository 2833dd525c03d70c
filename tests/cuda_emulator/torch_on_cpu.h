// Included before a CUDA binding, so that it serves CPU tensors: device "cuda" is the CPU, the stream is null.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

static inline AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
static inline AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
static inline AOTITorchError emulated_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
#define aoti_torch_get_current_cuda_stream emulated_current_stream

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define CUDA CPU  // what STABLE_TORCH_LIBRARY_IMPL registers for
