// Blocks of a U-Net on a CPU: float32 pictures [height][width][channels], one after the other; channels in multiples of
// 16. Weights are packed first; null pointers stand for what is not there.

#include "cpu_winograd.h"

namespace {

constexpr long QUERIES = 64;  // taken together

// Softmax of a row of scores; what fills the row up becomes zero
void softmax(float* row, long size, long filled) {
    std::fill(row + size, row + filled, -1e30f);
    vec high = load(row), sum{};
    for (long i = W; i < filled; i += W) high = largest(high, load(row + i));
    float top = high[0], total = 0;
    for (int i = 1; i < W; ++i) top = std::max(top, high[i]);
    for (long i = 0; i < filled; i += W) {
        vec e = power_of_e(load(row + i) - top);
        store(row + i, e);
        sum += e;
    }
    for (int i = 0; i < W; ++i) total += sum[i];
    for (long i = 0; i < filled; i += W) store(row + i, load(row + i) * (1 / total));
}

inline long attention_room(long pixels, long size) { return strips_of(pixels) * STRIP * (size + QUERIES); }

// One picture's attention: qkv [pixels][3][heads][size] -> y [pixels][heads * size]
void attended(const float* qkv, float* y, long pixels, long heads, long size, float* room) {
    long channels = heads * size, step = 3 * channels, length = strips_of(pixels) * STRIP;
    float *keys = room, *scores = keys + size * length;
    float scale = 1 / std::sqrt((float)size);
    for (long h = 0; h < heads; ++h) {
        const float *q = qkv + h * size, *k = q + channels, *v = k + channels;
        for (long s = 0; s < length; s += STRIP)  // [strip][size][STRIP]
            for (long c = 0; c < size; ++c)
                for (long i = 0; i < STRIP; ++i)
                    keys[s * size + c * STRIP + i] = s + i < pixels ? k[(s + i) * step + c] * scale : 0;
        for (long from = 0; from < pixels; from += QUERIES) {
            long rows = std::min(QUERIES, pixels - from);
            for (long s = 0; s < length; s += STRIP)
                product<false>(q + from * step, step, keys + s * size, STRIP, rows, size,
                               [=](long row, int j, vec value) { store(scores + row * length + s + j * W, value); });
            for (long row = 0; row < rows; ++row) softmax(scores + row * length, pixels, length);
            for (long c = 0; c < size; c += STRIP)
                product<false>(scores, length, v + c, step, rows, pixels, [=](long row, int j, vec value) {
                    if (c + j * W < size) store(y + (from + row) * channels + h * size + c + j * W, value);
                });
        }
    }
}

inline long reflected(long i, long size) { return i < 0 ? -i : i < size ? i : 2 * (size - 1) - i; }

inline vec filtered(vec a, vec b, vec c, vec d) { return 0.375f * (b + c) + 0.125f * (a + d); }

}  // namespace

#define NORM(i)                                                                                          \
    const float *gain##i, const float *shift##i, int64_t gain_step##i, int64_t shift_step##i, int64_t groups##i, \
        double eps##i
#define SHAPE int64_t pictures, int64_t height, int64_t width, int64_t in, int64_t out

extern "C" {

int64_t tdpm_strip() { return STRIP; }

// weight [out, in, 3, 3] with strides -> [strip][36][in][STRIP]
void tdpm_pack3x3(const float* w, int64_t out, int64_t in, int64_t so, int64_t si, int64_t sy, int64_t sx, float* u) {
    static const double G[6][3] = {{1 / 4., 0, 0},           {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
                                   {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
    for (long o = 0; o < strips_of(out) * STRIP; ++o)
        for (long c = 0; c < in; ++c) {
            double half[6][3] = {};
            for (int i = 0; o < out && i < 6; ++i)
                for (int x = 0; x < 3; ++x)
                    for (int y = 0; y < 3; ++y) half[i][x] += G[i][y] * w[o * so + c * si + y * sy + x * sx];
            for (int k = 0; k < 36; ++k) {
                double sum = 0;
                for (int x = 0; x < 3; ++x) sum += half[k / 6][x] * G[k % 6][x];
                u[((o / STRIP * 36 + k) * in + c) * STRIP + o % STRIP] = sum;
            }
        }
}

// weight [out, in] with strides -> [strip][in][STRIP]
void tdpm_pack1x1(const float* w, int64_t out, int64_t in, int64_t so, int64_t si, float* u) {
    for (long o = 0; o < strips_of(out) * STRIP; ++o)
        for (long c = 0; c < in; ++c)
            u[(o / STRIP * in + c) * STRIP + o % STRIP] = o < out ? w[o * so + c * si] : 0;
}

// y = convolution(act(norm(x))), padding 1, + bias
void tdpm_conv3x3(const float* x, NORM(), int64_t act, const float* u, const float* bias, float* y, SHAPE,
                  int64_t threads) {
    Norm norm{gain, shift, gain_step, shift_step, groups, (float)eps, act};
    Shape shape{pictures, height, width, in, out};
    Groups group(together(shape), shape, threads);
    long pixels = height * width;
#pragma omp parallel for num_threads(group.outer) if (group.outer > 1)
    for (long n = 0; n < pictures; n += group.size)
        convolved(x + n * pixels * in, norm, u, bias, nullptr, y + n * pixels * out, shape, n,
                  std::min<long>(group.size, pictures - n), group.inner);
}

// y = x + two of these, or a 1x1 convolution of x + two of these
void tdpm_residual(const float* x, NORM(1), NORM(2), int64_t act, const float* u1, const float* bias1, const float* u2,
                   const float* bias2, const float* u_skip, const float* bias_skip, float* y, SHAPE, int64_t between,
                   int64_t threads) {
    Norm norm1{gain1, shift1, gain_step1, shift_step1, groups1, (float)eps1, act};
    Norm norm2{gain2, shift2, gain_step2, shift_step2, groups2, (float)eps2, act};
    Shape shape1{pictures, height, width, in, between}, shape2{pictures, height, width, between, out};
    Groups group(std::min(together(shape1), together(shape2)), shape1, threads);
    long pixels = height * width;
#pragma omp parallel for num_threads(group.outer) if (group.outer > 1)
    for (long n = 0; n < pictures; n += group.size) {
        long count = std::min<long>(group.size, pictures - n);
        const float *from = x + n * pixels * in, *added = from;
        float *to = y + n * pixels * out, *h = halfway.get(count * pixels * between);
        convolved(from, norm1, u1, bias1, nullptr, h, shape1, n, count, group.inner);
        if (u_skip) pointwise(from, u_skip, bias_skip, nullptr, to, count * pixels, in, out, group.inner), added = to;
        convolved(h, norm2, u2, bias2, added, to, shape2, n, count, group.inner);
    }
}

// y = x times the weight + bias, for each pixel
void tdpm_conv1x1(const float* x, const float* u, const float* bias, float* y, SHAPE, int64_t threads) {
    pointwise(x, u, bias, nullptr, y, pictures * height * width, in, out, threads);
}

// y = x + project(attention(qkv(norm(x)))); in: channels, out: heads
void tdpm_attention(const float* x, NORM(), const float* qkv, const float* qkv_bias, const float* project,
                    const float* project_bias, float* y, SHAPE, int64_t threads) {
    Norm norm{gain, shift, gain_step, shift_step, groups, (float)eps, NONE};
    long pixels = height * width, size = in / out;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long n = 0; n < pictures; ++n) {
        float* h = scratch.get(4 * pixels * in + STRIP + attention_room(pixels, size) + Line::size(in));
        float* projected = h + pixels * in;
        float* room = projected + 3 * pixels * in + STRIP;  // STRIP: a last value's vector may reach beyond it
        const float* picture = x + n * pixels * in;
        Line line(room + attention_room(pixels, size), in);
        coefficients(picture, pixels, in, norm, n, line);
        for (long p = 0; p < pixels; ++p) normalised<NONE>(picture + p * in, h + p * in, in, line);
        pointwise(h, qkv, qkv_bias, nullptr, projected, pixels, in, 3 * in, 1);
        attended(projected, h, pixels, out, size, room);
        pointwise(h, project, project_bias, picture, y + n * pixels * in, pixels, in, in, 1);
    }
}

// Half or twice the size, through k-diffusion's default filter (1 3 3 1) / 8 in both directions, borders reflected.

void tdpm_downsample(const float* x, float* y, int64_t pictures, int64_t height, int64_t width, int64_t channels,
                     int64_t threads) {
    long down = height / 2, across = width / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long line = 0; line < pictures * down; ++line) {
        const float* rows[4];
        for (long k = 0; k < 4; ++k)
            rows[k] = x + (line / down * height + reflected(line % down * 2 - 1 + k, height)) * width * channels;
        float *sums = scratch.get(width * channels), *to = y + line * across * channels;
        for (long c = 0; c < width * channels; c += W)
            store(sums + c, filtered(load(rows[0] + c), load(rows[1] + c), load(rows[2] + c), load(rows[3] + c)));
        for (long j = 0; j < across; ++j) {
            const float* at[4];
            for (long k = 0; k < 4; ++k) at[k] = sums + reflected(2 * j - 1 + k, width) * channels;
            for (long c = 0; c < channels; c += W)
                store(to + j * channels + c,
                      filtered(load(at[0] + c), load(at[1] + c), load(at[2] + c), load(at[3] + c)));
        }
    }
}

void tdpm_upsample(const float* x, float* y, int64_t pictures, int64_t height, int64_t width, int64_t channels,
                   int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long line = 0; line < pictures * 2 * height; ++line) {
        long n = line / (2 * height), row = line % (2 * height) / 2;
        const float* near = x + (n * height + row) * width * channels;
        const float* far = x + (n * height + reflected(row + (line % 2 ? 1 : -1), height)) * width * channels;
        float *sums = scratch.get(width * channels), *to = y + line * 2 * width * channels;
        for (long c = 0; c < width * channels; c += W) store(sums + c, 0.75f * load(near + c) + 0.25f * load(far + c));
        for (long j = 0; j < 2 * width; ++j) {
            const float* mine = sums + j / 2 * channels;
            const float* other = sums + reflected(j / 2 + (j % 2 ? 1 : -1), width) * channels;
            for (long c = 0; c < channels; c += W)
                store(to + j * channels + c, 0.75f * load(mine + c) + 0.25f * load(other + c));
        }
    }
}

}  // extern "C"
