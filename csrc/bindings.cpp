// The compiled module's Python side: addresses, sizes and a stream in, nothing out. It knows no torch; sn_fast/ops
// checks tensors, allocates results, and is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/launch.h"

namespace py = pybind11;

namespace sn_fast {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

[[maybe_unused]] Stream stream_of(Address handle, int device) { return {pointer<std::remove_pointer_t<cudaStream_t>>(handle), device}; }

}  // namespace
}  // namespace sn_fast

#ifndef SN_FAST_MODULE
#define SN_FAST_MODULE _C
#endif

PYBIND11_MODULE(SN_FAST_MODULE, m) {
    using namespace sn_fast;
    m.doc() = "sn_fast's kernels. Arguments are checked in sn_fast.ops; use those operators instead.";
    m.attr("version") = SN_FAST_VERSION;
    m.attr("archs") = SN_FAST_ARCHS;
    m.attr("cuda_version") = SN_FAST_CUDA_VERSION;
#ifdef SN_FAST_ON_CPU
    m.def("set_thread_order", [](std::uint64_t seed) { on_cpu::thread_order() = seed; });
#endif
}
