// The machine that runs a launch on the CPU: blocks, and a fibre for each of their threads.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "emulator/copies.h"
#include "emulator/memory_model.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace sn_fast {
namespace emulator {

constexpr int kWarpLanes = 32;
constexpr std::size_t kStackBytes = (kWatched ? 64 : 256) * 1024;  // new ones are dear under ThreadSanitizer

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
__attribute__((noinline)) inline void make(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

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
        if (threads % kWarpLanes != 0) throw std::logic_error("emulator: blocks must consist of whole warps");
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
        {
            const Unwatched unwatched;
            ordering_->before_atomic(running_, address);
        }
        const T old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);  // watched, for plain accesses elsewhere
        const Unwatched unwatched;
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
                throw std::logic_error("emulator: deadlock, some threads wait at a barrier others never reach");
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

}  // namespace emulator
}  // namespace sn_fast
