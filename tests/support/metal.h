// What the kernels use of Metal, in C++20 on a CPU. Every thread of a threadgroup is a fibre that runs until it needs what
// other lanes hold. When all lanes of a simdgroup wait at the same place they are given it; that not all of them come
// there is an error, as it is undefined on a GPU.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <vector>

#define device
#define constant
#define thread
#define kernel

typedef unsigned int uint;
typedef unsigned short ushort;
typedef _Float16 half;
typedef _Float16 float16_t;

struct uint3 {
    uint x, y, z;
};

struct float2 {
    float values[2];
    float2() : values{NAN, NAN} {}
    float2(float x, float y) : values{x, y} {}
    float& operator[](int i) { return values[i]; }
    float operator[](int i) const { return values[i]; }
    float2 operator-(float2 o) const { return float2(values[0] - o.values[0], values[1] - o.values[1]); }
    float2 operator/(float o) const { return float2(values[0] / o, values[1] / o); }
};

namespace lanes {

constexpr int SIZE = 32, STACK = 1 << 16, BYTES = 32;

struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    uint3 in_grid;
    int index;
    bool done;
    int place;                         // of what it waits for: a line of the kernel
    char given[BYTES], got[SIZE][BYTES];  // by itself, and by all lanes of its simdgroup
};

inline ucontext_t scheduler;
inline Lane* current;
inline void (*body)();

inline void enter() {
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

template <typename Value>
void exchange(Value value, Value (&all)[SIZE], int place) {
    static_assert(sizeof(Value) <= BYTES);
    Lane* lane = current;
    std::memcpy(lane->given, &value, sizeof(Value));
    lane->place = place;
    swapcontext(&lane->context, &scheduler);
    for (int i = 0; i < SIZE; i++) std::memcpy(&all[i], lane->got[i], sizeof(Value));
}

inline void run_simdgroup(uint first_x, uint y, uint z) {
    static std::vector<Lane> group(SIZE);
    for (int i = 0; i < SIZE; i++) {
        Lane& lane = group[i];
        lane.stack.resize(STACK);
        lane.index = i;
        lane.done = false;
        lane.in_grid = {first_x + i, y, z};
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = STACK;
        makecontext(&lane.context, enter, 0);
    }
    for (;;) {
        int done = 0;
        for (Lane& lane : group) {
            current = &lane;
            swapcontext(&scheduler, &lane.context);
            done += lane.done;
        }
        if (done == SIZE) return;
        for (Lane& lane : group) {
            if (done || lane.place != group[0].place) {
                std::fprintf(stderr, "lanes diverge at line %d\n", lane.place);
                std::abort();
            }
        }
        for (Lane& to : group)
            for (int i = 0; i < SIZE; i++) std::memcpy(to.got[i], group[i].given, BYTES);
    }
}

}  // namespace lanes

#define thread_position_in_grid (lanes::current->in_grid)
#define thread_index_in_simdgroup (uint(lanes::current->index))

namespace metal {

using std::abs;
using std::max;
using std::min;
using where = std::source_location;

namespace precise {
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float exp(float x) { return std::exp(x); }
}  // namespace precise

inline float simd_sum(float x, where at = where::current()) {
    float all[lanes::SIZE], sum = 0;
    lanes::exchange(x, all, at.line());
    for (float other : all) sum += other;
    return sum;
}

inline float simd_shuffle_xor(float x, ushort mask, where at = where::current()) {
    float all[lanes::SIZE];
    lanes::exchange(x, all, at.line());
    return all[lanes::current->index ^ mask];
}

template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
    static_assert(ROWS == 8 && COLUMNS == 8);
    float2 own;
    float2& thread_elements() { return own; }
};

inline void place(int lane, int& row, int& column) {
    int quad = lane / 4;
    row = (quad & 4) + (lane / 2) % 4;
    column = (quad & 2) * 2 + (lane % 2) * 2;
}

typedef simdgroup_matrix<float, 8, 8> Matrix;

inline void simdgroup_multiply_accumulate(Matrix& d, Matrix& a, Matrix& b, Matrix& c, where at = where::current()) {
    struct Own {
        float2 a, b, c;
    } all[lanes::SIZE];
    lanes::exchange(Own{a.own, b.own, c.own}, all, at.line());
    float left[8][8], right[8][8];
    for (int lane = 0; lane < lanes::SIZE; lane++) {
        int row, column;
        place(lane, row, column);
        for (int side = 0; side < 2; side++) {
            left[row][column + side] = all[lane].a[side];
            right[row][column + side] = all[lane].b[side];
        }
    }
    int row, column;
    place(lanes::current->index, row, column);
    float2 sum = c.own;
    for (int side = 0; side < 2; side++)
        for (int inner = 0; inner < 8; inner++) sum[side] += left[row][inner] * right[inner][column + side];
    d.own = sum;
}

}  // namespace metal
