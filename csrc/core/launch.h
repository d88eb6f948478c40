// The seam between kernels and the machine that runs them: the one place with <<<>>>.
//
// A kernel takes one plain struct by value and all its shared memory as one struct, got by shared_memory<T>(). Compiled
// by nvcc it runs on a GPU; compiled by a C++ compiler with SN_FAST_EMULATOR it runs on csrc/emulator/cuda.h, which
// is how the tests run every kernel without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/check.h"

#ifdef SN_FAST_EMULATOR
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

namespace sn_fast {

constexpr int kWarp = 32;

// Where to run: a stream of a device. On the CPU both are ignored.
struct Stream {
    cudaStream_t handle;
    int device;
};

#ifndef SN_FAST_EMULATOR

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would report it once more
    throw std::runtime_error(text("sn_fast: ", what, ": ", cudaGetErrorString(status)));
}

// The driver's functions for the context that is current in this thread; there are no libraries to link with.
struct ContextOfThread {
    using Context = void*;
    int (*get)(Context*);
    int (*set)(Context);

    static const ContextOfThread& functions() {
        static const ContextOfThread found = [] {
            void* driver = dlopen("libcuda.so.1", RTLD_NOW);
            ContextOfThread all{};
            if (driver != nullptr) {
                all.get = reinterpret_cast<int (*)(Context*)>(dlsym(driver, "cuCtxGetCurrent"));
                all.set = reinterpret_cast<int (*)(Context)>(dlsym(driver, "cuCtxSetCurrent"));
            }
            if (all.get == nullptr || all.set == nullptr) throw std::runtime_error("sn_fast: no CUDA driver");
            return all;
        }();
        return found;
    }
};

// Makes a device current, and on leaving the context that was current before, which may be none: cudaSetDevice(0) would
// then create one, on a GPU that nobody uses.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        ContextOfThread::functions().get(&previous_);
        int current = 0;
        check_cuda(cudaGetDevice(&current), "cudaGetDevice");
        changed_ = previous_ == nullptr || device != current;
        if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (changed_) ContextOfThread::functions().set(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;

private:
    ContextOfThread::Context previous_ = nullptr;
    bool changed_ = false;
};

inline int multiprocessors(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

inline void fill_zero(void* memory, std::size_t bytes, const Stream& stream) {
    DeviceGuard guard(stream.device);
    check_cuda(cudaMemsetAsync(memory, 0, bytes, stream.handle), "cudaMemsetAsync");
}

#ifdef __CUDACC__

// The one dynamic shared-memory block of this thread block, as a struct.
template <class T>
__device__ T& shared_memory() {
    extern __shared__ __align__(16) unsigned char sn_fast_shared_memory[];
    return *reinterpret_cast<T*>(sn_fast_shared_memory);
}

// Lets the kernel that was launched `early` after this one start, once every block of this one came here or ended.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In a kernel that was launched `early`: waits until the one before it has ended, and its results can be read.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the device and the driver can start a kernel before the one before it has ended, also in a CUDA graph.
inline bool can_start_early(int device) {
    int major = 0, driver = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return major >= 9 && driver >= 12030;
}

// Starts `blocks` blocks of `threads` threads with `shared` bytes of shared memory; nothing waits for the device.
// `early`: before the kernel before it on the stream has ended; it has to call wait_for_previous.
template <class Params>
void launch(void (*kernel)(Params), const char* name, unsigned blocks, int threads, std::size_t shared,
            const Stream& stream, const Params& params, bool early = false) {
    if (blocks == 0) return;
    DeviceGuard guard(stream.device);
    if (shared > 48 * 1024)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                   name);
    if (early && can_start_early(stream.device)) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = shared;
        config.stream = stream.handle;
        config.attrs = &attribute;
        config.numAttrs = 1;
        check_cuda(cudaLaunchKernelEx(&config, kernel, params), name);
        return;
    }
    kernel<<<blocks, threads, shared, stream.handle>>>(params);
    check_cuda(cudaGetLastError(), name);
}

#endif
#endif

}  // namespace sn_fast
