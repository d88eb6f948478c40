// Memory between threads as ThreadSanitizer is to see it: which emulated threads there are, and what orders them.
//
// An emulated thread is a fiber of its own to ThreadSanitizer, and switching between them orders nothing. Memory is
// ordered by barriers, by __syncwarp and, between blocks, by fences (a shuffle orders none), as PTX defines it:
//
//   A fence of thread A, then an atomic of A that thread B's atomic sees, then a fence of B: what came before A's
//   fence, in A or in threads that A had met at a barrier, is visible to B and to threads that meet B at a
//   barrier after that.
//
// Fences in other places order nothing here: on a GPU they do so at best because fences of the strongest kind are
// numbered through. Without ThreadSanitizer all of this is empty.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace sn_fast {
namespace emulator {

#ifdef __SANITIZE_THREAD__

constexpr bool kWatched = true;

// While one exists, this thread's accesses are not looked at: they are the emulation's own.
class Unwatched {
public:
    Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
    ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
    Unwatched(const Unwatched&) = delete;
};

inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }

class Fiber {
public:
    Fiber() : handle_(__tsan_create_fiber(0)) {}
    ~Fiber() { __tsan_destroy_fiber(handle_); }
    Fiber(const Fiber&) = delete;
    static void* running() { return __tsan_get_current_fiber(); }
    static void go_on_as(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
    void* handle() const { return handle_; }

private:
    void* handle_;
};

#else

constexpr bool kWatched = false;

struct Unwatched {
    Unwatched() {}
    ~Unwatched() {}
};

inline void release(void*) {}
inline void acquire(void*) {}

class Fiber {
public:
    static void* running() { return nullptr; }
    static void go_on_as(void*) {}
    void* handle() const { return nullptr; }
};

#endif

// What orders the threads of one block. Of every block a new one: its places must remember nothing of others.
class Ordering {
public:
    explicit Ordering(int threads)
        : threads_(static_cast<std::size_t>(kWatched ? threads : 0)), warps_(static_cast<std::size_t>(threads) / 32) {}

    void* fiber(int thread) const {
        return kWatched ? threads_[static_cast<std::size_t>(thread)].fiber.handle() : nullptr;
    }

    // Before a thread waits at its n-th barrier of the block, or of its warp, and after it. Two places in turns are
    // enough: nobody comes to the next but one before all have left this one.
    void arrive(int thread, int warp, bool whole_block) {
        if (!kWatched) return;
        release(place(thread, warp, whole_block));
    }
    void depart(int thread, int warp, bool whole_block) {
        if (!kWatched) return;
        acquire(place(thread, warp, whole_block));
        ++threads_[static_cast<std::size_t>(thread)].barriers[whole_block];
    }

    void fence(int thread) {
        if (!kWatched) return;
        Thread& t = threads_[static_cast<std::size_t>(thread)];
        for (void* address : t.seen) acquire(address);
        t.seen.clear();
        release(&t.fenced);
        t.has_fenced = true;
    }

    // What came before the thread's last fence, and only that: another fiber hands it on, which knows nothing else.
    void before_atomic(int thread, void* address) {
        if (!kWatched) return;
        Thread& t = threads_[static_cast<std::size_t>(thread)];
        if (!t.has_fenced) return;
        if (!t.messenger) t.messenger = std::make_unique<Fiber>();
        void* self = Fiber::running();
        Fiber::go_on_as(t.messenger->handle());
        acquire(&t.fenced);
        release(address);
        Fiber::go_on_as(self);
    }
    void after_atomic(int thread, void* address) {
        if (kWatched) threads_[static_cast<std::size_t>(thread)].seen.push_back(address);
    }

private:
    struct Thread {
        Fiber fiber;
        char fenced = 0;  // the place of its fences
        bool has_fenced = false;
        std::unique_ptr<Fiber> messenger;  // of the few threads that need one
        unsigned barriers[2] = {0, 0};     // passed, of its warp and of the block
        std::vector<void*> seen;           // by atomics since its last fence
    };

    void* place(int thread, int warp, bool whole_block) {
        const unsigned turn = threads_[static_cast<std::size_t>(thread)].barriers[whole_block] % 2;
        return whole_block ? &block_[turn] : &warps_[static_cast<std::size_t>(warp)].places[turn];
    }

    struct Places {
        char places[2] = {0, 0};
    };

    std::vector<Thread> threads_;
    std::vector<Places> warps_;
    char block_[2] = {0, 0};
};

}  // namespace emulator
}  // namespace sn_fast
