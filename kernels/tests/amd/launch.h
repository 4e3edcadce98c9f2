// Runs a kernel's blocks on the host, behind its source: see wave.h. ENTRY is the kernel, PARAMS the type of its argument.
#pragma once

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

namespace host {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t LDS_BYTES = 64 * 1024;
// Behind what a block may use.
constexpr size_t GUARD_BYTES = 4096;
// A NaN in every type.
constexpr int UNWRITTEN = 0xff;

Slot* lane;
int thread;
unsigned block;
const void* argument;

static PARAMS params;
static Slot slots[MOST_THREADS];
static void* scheduler;
static char* stacks;

}  // namespace host

alignas(16) Piece shared[(host::LDS_BYTES + host::GUARD_BYTES) / sizeof(Piece)];

// Leaves registers on this stack, `*save` its pointer, and takes those on the other.
asm(R"(
.text
.local host_switch
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" __attribute__((visibility("hidden"))) void host_switch(void** save, void* other);

namespace host {

void wait(Operation operation) {
    lane->operation = operation;
    host_switch(&lane->stack, scheduler);
}

static void fiber() {
    ENTRY(params);
    wait(FINISHED);
}

static void prepare(int at) {
    // A return into `fiber` from a stack that is aligned as a call leaves it.
    void** top = (void**)(stacks + (size_t)(at + 1) * STACK_BYTES) - 2;
    *top = (void*)fiber;
    slots[at].stack = top - 6;
    slots[at].operation = RUN;
}

// Row of number `i` of C.
static int row_of(int number, int half) { return number / 4 * 8 + 4 * half + number % 4; }

static void product(Slot* wave, int depth) {
    for (int l = 0; l < WAVE; l++)
        for (int i = 0; i < 16; i++) {
            float sum = wave[l].c[i];
            for (int half = 0; half < 2; half++)
                for (int k = 0; k < depth; k++)
                    sum = __builtin_fmaf(wave[row_of(i, l / 32) + 32 * half].a[k], wave[l % 32 + 32 * half].b[k], sum);
            wave[l].c[i] = sum;
        }
}

// Does what all lanes of a wave wait for.
static void operate(Slot* wave) {
    unsigned words[WAVE];
    unsigned long long votes = 0;
    for (int l = 0; l < WAVE; l++) {
        words[l] = wave[l].word;
        if (wave[l].operation == BALLOT) votes |= (unsigned long long)wave[l].word << l;
    }
    switch (wave[0].operation) {
    case PERMUTE:
        for (int l = 0; l < WAVE; l++) wave[l].word = words[wave[l].from];
        break;
    case BALLOT:
        for (int l = 0; l < WAVE; l++) wave[l].votes = votes;
        break;
    case PRODUCT_OF_2: product(wave, 1); break;
    case PRODUCT_OF_8: product(wave, 4); break;
    default: break;
    }
    for (int l = 0; l < WAVE; l++) wave[l].operation = RUN;
}

// Runs a wave up to a barrier or its end; null, or what is wrong.
static const char* run_wave(int first) {
    Slot* wave = slots + first;
    for (;;) {
        for (int l = 0; l < WAVE; l++) {
            if (wave[l].operation != RUN) continue;
            lane = wave + l;
            thread = first + l;
            host_switch(&scheduler, lane->stack);
        }
        // Lanes that have finished take no part; operations that need all are refused then.
        Operation operation = FINISHED;
        bool together = true, all = true;
        for (int l = 0; l < WAVE; l++) {
            if (wave[l].operation == FINISHED) {
                all = false;
            } else if (operation == FINISHED) {
                operation = wave[l].operation;
            } else {
                together = together && wave[l].operation == operation;
            }
        }
        if (!together) return "lanes of a wave wait for different operations";
        if (operation == FINISHED || operation == BLOCK_BARRIER) return nullptr;
        if (!all) return "a lane has finished before an operation of its wave";
        operate(wave);
    }
}

static const char* run_block(int threads, size_t shared_bytes) {
    memset(shared, UNWRITTEN, sizeof shared);
    for (int at = 0; at < threads; at++) prepare(at);
    for (;;) {
        int waiting = 0, finished = 0;
        for (int first = 0; first < threads; first += WAVE)
            if (const char* wrong = run_wave(first)) return wrong;
        for (int at = 0; at < threads; at++) {
            waiting += slots[at].operation == BLOCK_BARRIER;
            finished += slots[at].operation == FINISHED;
        }
        if (finished == threads) break;
        if (waiting != threads) return "some threads have finished, others wait at a barrier";
        for (int at = 0; at < threads; at++) slots[at].operation = RUN;
    }
    for (size_t at = shared_bytes; at < sizeof shared; at++)
        if (((unsigned char*)shared)[at] != UNWRITTEN) return "shared memory is written beyond its end";
    return nullptr;
}

}  // namespace host

// Runs all blocks; null, or what is wrong.
extern "C" const char* tilefold_run(const void* argument, unsigned blocks, int threads, size_t shared_bytes) {
    using namespace host;
    if (threads > MOST_THREADS || threads % WAVE != 0 || shared_bytes > LDS_BYTES) return "a block is too large";
    const size_t bytes = (size_t)threads * STACK_BYTES;
    stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return "no memory for stacks";
    memcpy(&params, argument, sizeof params);
    host::argument = &params;
    const char* wrong = nullptr;
    for (block = 0; block < blocks && !wrong; block++) wrong = run_block(threads, shared_bytes);
    munmap(stacks, bytes);
    return wrong;
}
