// Runs CUDA kernels on the CPU, for tests: one fibre per CUDA thread, blocks one after the other or on OS threads.
//
// Between two synchronisations a fibre runs alone in its block, and the order in which fibres (and blocks) run is shuffled
// by a seed, so a kernel that needs a barrier it does not have computes different results under different seeds. Shared
// memory is a heap block of exactly the size asked for, filled with NaN before each block, so AddressSanitizer sees
// every access beyond it. With several blocks at a time, ThreadSanitizer sees what is not ordered between them
// (memory_model.h). Time is not modelled, and it is no CPU path for users.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "on_cpu/memory_model.h"
#include "on_cpu/tensor_core.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = void*;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace sn_fast {

inline float bits_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t float_as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

namespace on_cpu {

constexpr int kWarpLanes = 32;
constexpr std::size_t kStackBytes = 256 * 1024;

// Switching between stacks. ucontext does it everywhere, but makes two system calls each time.
#ifdef __x86_64__

using Context = void*;  // the stack pointer, below the saved registers

__attribute__((naked, noinline)) inline void switch_context(Context*, Context) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void swap(Context& from, Context& to) { switch_context(&from, to); }

inline void make(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    const auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
    auto* saved = reinterpret_cast<std::uintptr_t*>(top) - 8;  // six registers, the entry, and where it would return to
    std::fill(saved, saved + 8, std::uintptr_t{0});
    saved[6] = reinterpret_cast<std::uintptr_t>(entry);
    context = saved;
}

#else

using Context = ucontext_t;

inline void swap(Context& from, Context& to) { swapcontext(&from, &to); }

// Not inlined: getcontext returns twice as far as the compiler knows.
__noinline__ inline void make(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

// Asynchronous copies of one thread: done when they are waited for and not before, so that a wait too few is seen.
class Copies {
public:
    void add(float* to, const float* from, bool wanted) { copies_.push_back({to, wanted ? from : nullptr, group_}); }
    void end_group() { ++group_; }
    void wait(int groups) {
        const float zero = 0.0f;
        std::size_t done = 0;
        for (; done < copies_.size() && copies_[done].group < group_ - groups; ++done)
            std::memcpy(copies_[done].to, copies_[done].from ? copies_[done].from : &zero, sizeof zero);
        copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(done));
    }
    void clear() { copies_.clear(), group_ = 0; }

private:
    struct Copy {
        float* to;
        const float* from;
        int group;
    };
    std::vector<Copy> copies_;
    int group_ = 0;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fibre {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = State::kReady;
    dim3 thread;
    int shuffles = 0;      // parity chooses the exchange slot, so that one barrier per exchange is enough
    void* fake = nullptr;  // AddressSanitizer's fake stack
    Copies copies;
};

// One exchange slot per lane and parity: large enough for the fragments of a matrix instruction.
struct Warp {
    std::uint64_t slots[2][kWarpLanes][8];
};

inline std::uint64_t& thread_order() {
    static std::uint64_t seed = 0;
    return seed;
}

// How many blocks run at once, each on an OS thread of its own.
inline int& parallel() {
    static int count = 1;
    return count;
}

// The blocks of one launch, in the order in which they start.
struct Queue {
    std::vector<unsigned> blocks;
    std::atomic<std::size_t> taken{0};

    explicit Queue(unsigned count) : blocks(count) {
        for (unsigned b = 0; b < count; ++b) blocks[b] = b;
        std::mt19937_64 random(thread_order());
        if (thread_order() != 0) std::shuffle(blocks.begin(), blocks.end(), random);
    }
};

// Runs blocks of one launch, one after the other.
class Machine {
public:
    Machine(unsigned blocks, int threads, std::size_t shared) : threads_(threads), warps_(threads / kWarpLanes) {
        if (threads % kWarpLanes != 0) throw std::logic_error("cuda_on_cpu: blocks must consist of whole warps");
        gridDim.x = blocks;
        blockDim.x = static_cast<unsigned>(threads);
        shared_bytes = shared;
    }

    // Takes blocks until there are none.
    void run(Queue& queue, const std::function<void()>& body) {
        body_ = &body;
        Machine* outer = current();
        current() = this;
        struct Restore {
            Machine* outer;
            ~Restore() {
                current() = outer;
                if (kWatched) pool().clear();
            }
        } restore{outer};
        pool().resize(std::max(pool().size(), static_cast<std::size_t>(threads_)));
        for (std::size_t i; (i = queue.taken.fetch_add(1, std::memory_order_relaxed)) < queue.blocks.size();) {
            std::mt19937_64 random(thread_order() + i);
            run_block(queue.blocks[i], random);
        }
        acquire(&done_);  // not before: blocks are not ordered
    }

    static Machine*& current() {
        static thread_local Machine* machine = nullptr;
        return machine;
    }

    Fibre& fibre() { return pool()[static_cast<std::size_t>(running_)]; }

    // What has a fibre of its own and is no access of the kernel is unwatched.
    void block_barrier() {
        const Unwatched unwatched;
        ordering_->arrive(running_, running_ / kWarpLanes, true);
        wait(State::kAtBlockBarrier);
        ordering_->depart(running_, running_ / kWarpLanes, true);
    }
    void warp_barrier() {
        const Unwatched unwatched;
        ordering_->arrive(running_, running_ / kWarpLanes, false);
        wait(State::kAtWarpBarrier);
        ordering_->depart(running_, running_ / kWarpLanes, false);
    }
    void fence() {
        const Unwatched unwatched;
        ordering_->fence(running_);
    }
    template <class T>
    T atomic_add(T* address, T value) {
        const Unwatched unwatched;  // which does not apply to atomics
        ordering_->before_atomic(running_, address);
        const T old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
        ordering_->after_atomic(running_, address);
        return old;
    }

    // Publishes `mine` to the warp; returns all lanes' values, valid until the next exchange but one.
    template <class T>
    const std::uint64_t (*exchange(const T& mine))[8] {
        static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
        const Unwatched unwatched;
        Fibre& self = fibre();
        auto& slots = warps_[static_cast<std::size_t>(running_ / kWarpLanes)].slots[self.shuffles++ % 2];
        std::memcpy(slots[running_ % kWarpLanes], &mine, sizeof mine);
        wait(State::kAtWarpBarrier);  // which orders no memory
        return slots;
    }

    int lane() const { return running_ % kWarpLanes; }

    dim3 gridDim, blockDim, blockIdx;
    std::size_t shared_bytes;
    std::unique_ptr<unsigned char[]> shared;

private:
    static std::vector<Fibre>& pool() {
        static thread_local std::vector<Fibre> fibres;
        return fibres;
    }

    void run_block(unsigned block, std::mt19937_64& random) {
        blockIdx.x = block;
        ordering_ = std::make_unique<Ordering>(threads_);
        scheduler_fiber_ = Fiber::running();
        shared.reset(new unsigned char[shared_bytes]);
        std::memset(shared.get(), 0xff, shared_bytes);
        std::vector<int> order(static_cast<std::size_t>(threads_));
        for (int t = 0; t < threads_; ++t) {
            order[static_cast<std::size_t>(t)] = t;
            prepare(t);
        }
        std::vector<bool> late(warps_.size(), false);
        for (int alive = threads_; alive > 0;) {
            if (thread_order() != 0) {
                std::shuffle(order.begin(), order.end(), random);
                // Some warps wait, so that others run ahead of them as far as barriers let them.
                for (std::size_t w = 0; w < late.size(); ++w) late[w] = random() % 2 != 0;
            }
            bool moved = false, skipped = false;
            for (int t : order) {
                Fibre& f = pool()[static_cast<std::size_t>(t)];
                if (f.state != State::kReady) continue;
                if (late[static_cast<std::size_t>(t / kWarpLanes)]) {
                    skipped = true;
                    continue;
                }
                moved = true;
                resume(t);
                if (failure_) std::rethrow_exception(failure_);
                if (f.state == State::kDone) --alive;
            }
            moved |= release_barriers();
            if (!moved && !skipped)
                throw std::logic_error("cuda_on_cpu: deadlock, some threads wait at a barrier others never reach");
        }
        shared.reset();
    }

    static void prepare(int t) {
        Fibre& f = pool()[static_cast<std::size_t>(t)];
        f.state = State::kReady;
        f.shuffles = 0;
        f.copies.clear();
        if (kWatched) f.stack.reset(new char[kStackBytes]);  // nobody has been there
        f.thread = {static_cast<unsigned>(t), 0, 0};
        make(f.context, f.stack.get(), kStackBytes, &Machine::enter);
    }

    // Opens every barrier at which all living threads of its block or warp wait.
    bool release_barriers() {
        bool opened = open(0, threads_, State::kAtBlockBarrier);
        for (int w = 0; w < threads_; w += kWarpLanes) opened |= open(w, w + kWarpLanes, State::kAtWarpBarrier);
        return opened;
    }

    bool open(int first, int last, State barrier) {
        bool any = false;
        for (int t = first; t < last; ++t) {
            const State s = pool()[static_cast<std::size_t>(t)].state;
            if (s != barrier && s != State::kDone) return false;
            any |= s == barrier;
        }
        for (int t = first; t < last; ++t) {
            State& s = pool()[static_cast<std::size_t>(t)].state;
            if (s == barrier) s = State::kReady;
        }
        return any;
    }

    void resume(int t) {
        running_ = t;
        Fibre& f = fibre();
#ifdef __SANITIZE_ADDRESS__
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStackBytes);
#endif
        Fiber::go_on_as(ordering_->fiber(t));
        swap(scheduler_, f.context);
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    void wait(State barrier) {
        Fibre& f = fibre();
        f.state = barrier;
        leave(f, false);
    }

    void leave(Fibre& f, bool for_good) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake, scheduler_stack_, scheduler_stack_bytes_);
#else
        (void)for_good;
#endif
        Fiber::go_on_as(scheduler_fiber_);
        swap(f.context, scheduler_);
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(f.fake, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
    }

    static void enter() {
        Machine& m = *current();
        Fibre& f = m.fibre();
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack_, &m.scheduler_stack_bytes_);
#endif
        try {
            (*m.body_)();
        } catch (...) {
            m.failure_ = std::current_exception();
        }
        m.end(f);
    }

    void end(Fibre& f) {
        {
            const Unwatched unwatched;
            f.state = State::kDone;
            release(&done_);
        }
        leave(f, true);
    }

    int threads_;
    std::vector<Warp> warps_;
    int running_ = 0;
    Context scheduler_;
    void* scheduler_fiber_ = nullptr;
    std::unique_ptr<Ordering> ordering_;
    char done_ = 0;  // what all threads have done, for who waits for the launch
    const std::function<void()>* body_ = nullptr;
    std::exception_ptr failure_;
#ifdef __SANITIZE_ADDRESS__
    const void* scheduler_stack_ = nullptr;
    std::size_t scheduler_stack_bytes_ = 0;
#endif
};

inline Machine& machine() { return *Machine::current(); }

}  // namespace on_cpu

// -- what launch.h offers on a GPU -----------------------------------------------------------------------------------

struct Stream;

inline int multiprocessors(int) { return 3; }

inline void let_next_start() {}
inline void wait_for_previous() {}

inline void fill_zero(void* memory, std::size_t bytes, const Stream&) { std::memset(memory, 0, bytes); }

template <class T>
T& shared_memory() {
    if (sizeof(T) > on_cpu::machine().shared_bytes) throw std::logic_error("cuda_on_cpu: shared memory too small");
    return *reinterpret_cast<T*>(on_cpu::machine().shared.get());
}

template <class Params>
void launch(void (*kernel)(Params), const char*, unsigned blocks, int threads, std::size_t shared, const Stream&,
            const Params& params, bool = false) {
    on_cpu::Queue queue(blocks);
    const std::size_t machines = std::min(static_cast<std::size_t>(on_cpu::parallel()), queue.blocks.size());
    std::vector<std::exception_ptr> failures(machines);
    const auto work = [&](std::size_t machine) {
        const on_cpu::Unwatched unwatched;  // as is all that is not done by the fibres
        try {
            on_cpu::Machine(blocks, threads, shared).run(queue, [&] { kernel(params); });
        } catch (...) {
            failures[machine] = std::current_exception();
        }
    };
    if (machines == 1 && !on_cpu::kWatched) {
        work(0);
    } else {
        std::vector<std::thread> os_threads;
        for (std::size_t i = 0; i < machines; ++i) os_threads.emplace_back(work, i);
        for (std::thread& t : os_threads) t.join();
    }
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace sn_fast

// -- CUDA's names ----------------------------------------------------------------------------------------------------

#define threadIdx (::sn_fast::on_cpu::machine().fibre().thread)
#define blockIdx (::sn_fast::on_cpu::machine().blockIdx)
#define blockDim (::sn_fast::on_cpu::machine().blockDim)
#define gridDim (::sn_fast::on_cpu::machine().gridDim)

inline void __syncthreads() { sn_fast::on_cpu::machine().block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { sn_fast::on_cpu::machine().warp_barrier(); }
inline void __threadfence() { sn_fast::on_cpu::machine().fence(); }

template <class T>
T sn_fast_lane_value(const std::uint64_t (*slots)[8], int lane) {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return sn_fast_lane_value<T>(sn_fast::on_cpu::machine().exchange(value), lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = sn_fast::on_cpu::machine().lane();
    return sn_fast_lane_value<T>(sn_fast::on_cpu::machine().exchange(value), lane ^ mask);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
    const int lane = sn_fast::on_cpu::machine().lane();
    return sn_fast_lane_value<T>(sn_fast::on_cpu::machine().exchange(value), std::min(lane + delta, 31));
}

template <class T>
T atomicAdd(T* address, T value) {
    return sn_fast::on_cpu::machine().atomic_add(address, value);
}

template <class T>
T __ldcg(const T* address) {
    return *address;
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

inline void sincospif(float x, float* sine, float* cosine) {
    const double angle = 3.14159265358979323846 * static_cast<double>(x);
    *sine = static_cast<float>(std::sin(angle)), *cosine = static_cast<float>(std::cos(angle));
}

template <class T>
T min(T a, T b) {
    return std::min(a, b);
}
template <class T>
T max(T a, T b) {
    return std::max(a, b);
}
