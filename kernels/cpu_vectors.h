// Vectors of the width that the target has, through the compiler's own types; activations; products of matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 8;  // floats in a vector; rows of a product held in registers
#else
constexpr int W = 8, ROWS = 6;
#endif
constexpr int VECTORS = 2, STRIP = VECTORS * W;  // columns of a product held in registers

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline vec load(const float* p) { return *(const loose*)p; }
inline void store(float* p, vec v) { *(loose*)p = v; }
inline vec splat(float x) { return x - vec{}; }
inline vec smallest(vec a, vec b) { return a < b ? a : b; }  // b where either is no number
inline vec largest(vec a, vec b) { return a > b ? a : b; }

// Memory of a thread's own, kept from call to call.
struct Scratch {
    float* data = nullptr;
    long size = 0;
    float* get(long floats) {
        if (floats > size) {
            std::free(data);
            size = (floats + 4095) / 1024 * 1024;
            data = (float*)std::aligned_alloc(64, size * sizeof(float));
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch, surrounded, halfway;

// Activations

inline vec inverse(vec x) {
#if defined(__AVX512F__)
    vec y = (vec)_mm512_rcp14_ps((__m512)x);  // and a Newton step: a third of what dividing 16 values takes
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

inline vec power_of_e(vec x) {  // to 2 units in the last place
    x = smallest(largest(x, splat(-87.0f)), splat(88.0f));
    vec scaled = x * 1.44269504f + (x < 0 ? splat(-0.5f) : splat(0.5f));
    ivec n = __builtin_convertvector(scaled, ivec);
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // log 2 in two parts
    vec y = splat(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    return y * (vec)((n + 127) << 23);
}

inline vec gelu(vec x) {  // x Phi(x); Phi - 1/2 = x P(x^2) / Q(x^2), fitted on [-5.3, 5.3], to 3e-7
    vec least = largest(splat(-5.3f), x), near = smallest(splat(5.3f), least), u = near * near;
    vec p = splat(6.264272601e-06f), q = splat(5.297854156e-07f);
    for (float c : {3.415938260e-04f, 5.699226628e-03f, 5.206798964e-02f, 3.989418264e-01f}) p = p * u + c;
    for (float c : {1.225225167e-04f, 2.863321885e-03f, 3.882830602e-02f, 2.971744417e-01f, 1.0f}) q = q * u + c;
    return least * (0.5f + near * p * inverse(q));
}

inline vec silu(vec x) { return x * inverse(1.0f + power_of_e(-x)); }

enum Act { NONE, SILU, GELU };

template <int act>
inline vec activated(vec x) {
    return act == GELU ? gelu(x) : act == SILU ? silu(x) : x;
}

// Products: rows [rows, depth] times a strip of columns [depth, STRIP], handed to out(row, vector, value)

template <int M, bool ahead, class Out>
inline void rows_by_strip(const float* a, long a_step, const float* b, long b_step, long depth, long row, Out out) {
    vec sum[M][VECTORS] = {};
    for (long k = 0; k < depth; ++k) {
        if (ahead)
            for (int line = 0; line < STRIP; line += 16) __builtin_prefetch(b + (depth + k) * b_step + line);
        vec column[VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) column[j] = load(b + k * b_step + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            vec factor = splat(a[i * a_step + k]);
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; ++j) sum[i][j] += factor * column[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) out(row + i, j, sum[i][j]);
}

template <class Fetch, class Block>
inline void blocks_of(Block block, long take, long row) {
    switch (take) {
        case 1: return block(std::integral_constant<int, 1>(), Fetch(), row);
        case 2: return block(std::integral_constant<int, 2>(), Fetch(), row);
        case 3: return block(std::integral_constant<int, 3>(), Fetch(), row);
        case 4: return block(std::integral_constant<int, 4>(), Fetch(), row);
        case 5: return block(std::integral_constant<int, 5>(), Fetch(), row);
        case 6: return block(std::integral_constant<int, 6>(), Fetch(), row);
#if defined(__AVX512F__)
        case 7: return block(std::integral_constant<int, 7>(), Fetch(), row);
        case 8: return block(std::integral_constant<int, 8>(), Fetch(), row);
#endif
    }
}

// In blocks of ROWS; what is left over is shared by the last two, as a block of one or two rows would wait for itself.
// `ahead`: the next strip lies behind this one, and is fetched meanwhile.
template <bool ahead, class Out>
inline void product(const float* a, long a_step, const float* b, long b_step, long rows, long depth, Out out) {
    auto block = [&](auto size, auto fetch, long row) {
        rows_by_strip<size.value, fetch.value>(a + row * a_step, a_step, b, b_step, depth, row, out);
    };
    for (long row = 0, take; row < rows; row += take) {
        long left = rows - row;
        take = left > ROWS && left < 2 * ROWS ? (left + 1) / 2 : std::min<long>(left, ROWS);
        if (ahead && row == 0)
            blocks_of<std::true_type>(block, take, row);
        else
            blocks_of<std::false_type>(block, take, row);
    }
}

inline long strips_of(long channels) { return (channels + STRIP - 1) / STRIP; }

// y [rows, out] = x [rows, in] times a packed weight [strip][in][STRIP], plus bias, plus residual; both may be missing
void pointwise(const float* x, const float* u, const float* bias, const float* residual, float* y, long rows, long in,
               long out, long threads) {
    long part = (rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long from = 0; from < rows; from += part)
        for (long s = 0; s < strips_of(out); ++s)
            product<true>(x + from * in, in, u + s * in * STRIP, STRIP, std::min(part, rows - from), in,
                          [=](long row, int j, vec value) {
                              long column = s * STRIP + j * W, at = (from + row) * out + column;
                              if (column >= out) return;
                              if (bias) value += load(bias + column);
                              if (residual) value += load(residual + at);
                              store(y + at, value);
                          });
}

}  // namespace
