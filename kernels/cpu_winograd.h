// Group norm, activation and 3x3 convolution of a few pictures at a time, so that what lies between stays in the cache.
//
// Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): a 4x4 tile of the result takes 36 products for each pair
// of channels instead of 144. The products of one position in the transformed tiles are one product of matrices.
#pragma once

#include "cpu_vectors.h"

namespace {

// Group normalisation of whole pictures, with a gain and a shift for each channel, the same for all pictures or not.
struct Norm {
    const float *gain, *shift;   // null: 1 and 0
    long gain_step, shift_step;  // from one picture to the next
    long groups;                 // 0: no norm
    float eps;
    long act;
};

// Of each channel of up to `count` vectors: something close to its mean, so that squares keep their digits however
// large that is, and the sums of the differences from it and of their squares
template <int count>
void moments(const float* x, long pixels, long channels, long vectors, float* pivot, float* sums, float* squares) {
    if constexpr (count > 1)
        if (vectors < count) return moments<count - 1>(x, pixels, channels, vectors, pivot, sums, squares);
    vec total[count] = {}, sum[count] = {}, square[count] = {};
    long sampled = std::min<long>(pixels, 16);
    for (long k = 0; k < sampled; ++k)
        for (int j = 0; j < count; ++j) total[j] += load(x + k * pixels / sampled * channels + j * W);
    for (int j = 0; j < count; ++j) total[j] *= 1.0f / sampled;
    for (long p = 0; p < pixels; ++p)
#pragma GCC unroll 4
        for (int j = 0; j < count; ++j) {
            vec off = load(x + p * channels + j * W) - total[j];
            sum[j] += off, square[j] += off * off;
        }
    for (int j = 0; j < count; ++j) {
        store(pivot + j * W, total[j]);
        store(sums + j * W, sum[j]);
        store(squares + j * W, square[j]);
    }
}

// norm(x) = (x - mean) * factor + offset, for each channel
struct Line {
    float *mean, *factor, *offset;
    Line(float* room, long channels) : mean(room), factor(room + channels), offset(room + 2 * channels) {}
    static long size(long channels) { return 3 * channels; }
};

void coefficients(const float* x, long pixels, long channels, const Norm& norm, long picture, const Line& line) {
    if (!norm.groups) {
        std::fill(line.factor, line.factor + channels, 1.0f);
        std::fill(line.mean, line.mean + channels, 0.0f);
        std::fill(line.offset, line.offset + channels, 0.0f);
        return;
    }
    constexpr int MANY = 4;  // vectors at a time: they lie side by side in memory
    float *pivot = line.mean, *sums = line.factor, *squares = line.offset;
    for (long c = 0; c < channels; c += MANY * W)
        moments<MANY>(x + c, pixels, channels, (channels - c) / W, pivot + c, sums + c, squares + c);
    const float* gain = norm.gain ? norm.gain + picture * norm.gain_step : nullptr;
    const float* shift = norm.shift ? norm.shift + picture * norm.shift_step : nullptr;
    long width = channels / norm.groups;
    for (long from = 0, to = width; to <= channels; from += width, to += width) {
        double mean = 0, square = 0;
        for (long c = from; c < to; ++c) mean += pivot[c] + sums[c] / (double)pixels;
        mean /= width;
        for (long c = from; c < to; ++c) {
            double off = pivot[c] - mean;
            square += squares[c] + 2 * sums[c] * off + pixels * off * off;
        }
        double inverse = 1 / std::sqrt(std::max(0.0, square) / (pixels * (double)width) + norm.eps);
        float rounded = mean;
        for (long c = from; c < to; ++c) {
            double factor = inverse * (gain ? gain[c] : 1.0f);
            line.mean[c] = rounded, line.factor[c] = factor;
            line.offset[c] = (shift ? shift[c] : 0.0f) + (rounded - mean) * factor;
        }
    }
}

template <int act>
inline void normalised(const float* x, float* y, long channels, const Line& line) {
    for (long c = 0; c < channels; c += W) {
        vec off = load(x + c) - load(line.mean + c);
        store(y + c, activated<act>(off * load(line.factor + c) + load(line.offset + c)));
    }
}

// One picture [height][width][channels] -> [rows][columns][channels], zeros around it
template <int act>
void padded(const float* x, float* y, long height, long width, long rows, long columns, long channels,
            const Line& line) {
    long row = columns * channels;
    std::memset(y, 0, row * sizeof(float));
    for (long i = 0; i < height; ++i) {
        float* to = y + (i + 1) * row;
        std::memset(to, 0, channels * sizeof(float));
        for (long j = 0; j < width; ++j)
            normalised<act>(x + (i * width + j) * channels, to + (j + 1) * channels, channels, line);
        std::memset(to + (width + 1) * channels, 0, (columns - width - 1) * channels * sizeof(float));
    }
    std::memset(y + (height + 1) * row, 0, (rows - height - 1) * row * sizeof(float));
}

// Winograd's transforms

inline void before(const vec* d, long step, vec* v, long v_step) {
    vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    vec a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
    v[0] = 4 * d0 - 5 * d2 + d4, v[v_step] = a + b, v[2 * v_step] = a - b;
    v[3 * v_step] = c + e, v[4 * v_step] = c - e, v[5 * v_step] = 4 * d1 - 5 * d3 + d5;
}

inline void after(const vec* m, long step, vec* y, long y_step) {
    vec m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
    vec s = m1 + m2, d = m1 - m2, t = m3 + m4, u = m3 - m4;
    y[0] = m[0] + s + t, y[y_step] = d + 2 * u, y[2 * y_step] = s + 4 * t, y[3 * y_step] = d + 8 * u + m[5 * step];
}

// 6x6 values of the input, `row` and `channels` apart -> 36 to multiply, `plane` apart
inline void tile_before(const float* x, long row, long channels, float* v, long plane) {
    vec d[36], half[36];
#pragma GCC unroll 36
    for (int k = 0; k < 36; ++k) d[k] = load(x + k / 6 * row + k % 6 * channels);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) before(d + j, 6, half + j, 6);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) before(half + 6 * i, 1, d + 6 * i, 1);
#pragma GCC unroll 36
    for (int k = 0; k < 36; ++k) store(v + k * plane, d[k]);
}

inline void tile_after(const float* m, long plane, vec* y) {
    vec d[36], half[24];
#pragma GCC unroll 36
    for (int k = 0; k < 36; ++k) d[k] = load(m + k * plane);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) after(d + j, 6, half + j, 6);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) after(half + 6 * i, 1, y + 4 * i, 1);
}

// What lies within the picture of a tile of the result
template <bool added>
inline void written(const vec* done, vec plus, const float* residual, float* y, long rows, long columns, long row,
                    long channels) {
#pragma GCC unroll 16
    for (long p = 0; p < 16; ++p) {
        if (p / 4 >= rows || p % 4 >= columns) continue;
        long at = p / 4 * row + p % 4 * channels;
        vec value = done[p] + plus;
        store(y + at, added ? value + load(residual + at) : value);
    }
}

struct Shape {
    long pictures, height, width, in, out;
};

// A picture's tiles, and its size in memory with what they read around it
struct Tiles {
    long down, across, each, rows, columns, padded;
    explicit Tiles(const Shape& s)
        : down((s.height + 3) / 4), across((s.width + 3) / 4), each(down * across), rows(4 * down + 2),
          columns(4 * across + 2), padded(rows * columns * s.in) {}
    long corner(long index, long channels) const {
        long tile = index % each;
        return index / each * padded + (tile / across * columns + tile % across) * 4 * channels;
    }
};

constexpr long CACHE = 96 * 1024;  // floats: what of a second-level cache the transforms may take

// Tiles taken together: as many as fit in the cache with both of their transforms, in whole blocks of rows
long together(const Shape& s) {
    long fit = CACHE / (36 * (s.in + STRIP)) / ROWS * ROWS;
    return std::max<long>(fit, ROWS);
}

// How pictures are shared out: in groups that stay in a thread's cache, or, where these are fewer than the threads, all
// of them together with several threads in each step.
struct Groups {
    long size, outer, inner;
    Groups(long tiles, const Shape& s, long threads) : size(std::max<long>(1, tiles / Tiles(s).each)) {
        bool few = (s.pictures + size - 1) / size < threads;
        outer = few ? 1 : threads, inner = few ? threads : 1;
        if (few) size = std::max<long>(1, s.pictures);
    }
};

// act(norm(x)) of a picture with zeros around it
void prepared(const float* x, const Norm& norm, long picture, const Shape& s, const Tiles& tiles, float* y) {
    Line line(scratch.get(Line::size(s.in)), s.in);
    coefficients(x, s.height * s.width, s.in, norm, picture, line);
    auto pad = norm.act == GELU ? padded<GELU> : norm.act == SILU ? padded<SILU> : padded<NONE>;
    pad(x, y, s.height, s.width, tiles.rows, tiles.columns, s.in, line);
}

// One strip of the channels of a tile, transformed back and put in its place
void finished(const float* m, long plane, const float* bias, const float* residual, float* y, const Shape& s,
              const Tiles& tiles, long index, long channel) {
    long n = index / tiles.each, tile = index % tiles.each;
    long top = tile / tiles.across * 4, left = tile % tiles.across * 4;
    long rows = std::min(4L, s.height - top), columns = std::min(4L, s.width - left);
    for (long c = 0; c < STRIP && channel < s.out; c += W, channel += W) {
        vec done[16], plus = bias ? load(bias + channel) : vec{};
        tile_after(m + c, plane, done);
        long at = ((n * s.height + top) * s.width + left) * s.out + channel;
        if (residual)
            written<true>(done, plus, residual + at, y + at, rows, columns, s.width * s.out, s.out);
        else
            written<false>(done, plus, nullptr, y + at, rows, columns, s.width * s.out, s.out);
    }
}

// `count` tiles, from the pictures with zeros around them to the result
void multiplied(const float* input, const float* u, const float* bias, const float* residual, float* y, const Shape& s,
                const Tiles& tiles, long from, long count) {
    long v_plane = count * s.in + 16, m_plane = count * STRIP + 16;  // 16: planes apart by a power of two would collide
    float *v = scratch.get(36 * (v_plane + m_plane)), *m = v + 36 * v_plane;
    for (long i = 0; i < count; ++i) {
        const float* corner = input + tiles.corner(from + i, s.in);
        for (long c = 0; c < s.in; c += W)
            tile_before(corner + c, tiles.columns * s.in, s.in, v + i * s.in + c, v_plane);
    }
    for (long strip = 0; strip < strips_of(s.out); ++strip) {
        for (long k = 0; k < 36; ++k) {
            float* to = m + k * m_plane;
            product<true>(v + k * v_plane, s.in, u + (strip * 36 + k) * s.in * STRIP, STRIP, count, s.in,
                          [to](long row, int j, vec value) { store(to + row * STRIP + j * W, value); });
        }
        for (long i = 0; i < count; ++i)
            finished(m + i * STRIP, m_plane, bias, residual, y, s, tiles, from + i, strip * STRIP);
    }
}

// y = convolution(act(norm(x))) + bias + residual, of a few pictures, whose gains and shifts start at `first`
void convolved(const float* x, const Norm& norm, const float* u, const float* bias, const float* residual, float* y,
               const Shape& s, long first, long pictures, long threads) {
    Tiles tiles(s);
    float* input = surrounded.get(pictures * tiles.padded);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long n = 0; n < pictures; ++n)
        prepared(x + n * s.height * s.width * s.in, norm, first + n, s, tiles, input + n * tiles.padded);
    long all = pictures * tiles.each, block = std::min(together(s), (all + threads - 1) / threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long from = 0; from < all; from += block)
        multiplied(input, u, bias, residual, y, s, tiles, from, std::min(block, all - from));
}

}  // namespace
