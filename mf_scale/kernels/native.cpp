// Mask loss and matching sums on a CPU, one pass over the pixels. Built on first use by native.py; plain C interface.
//
// Every function deals a fixed part of the work to a task that is computed alone and in a fixed order, so results do not
// depend on the number of threads. fp32 only; sums over more than a row or a block are kept in double.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int16_t IGNORED = -2;  // data/batch.py: IGNORE

// exp(-a) for a in [0, 87], NaN for NaN: 2^n e^f with |f| <= ln2 / 2 and a polynomial for e^f (error 2e-7).
inline float exp_minus(float a) {
    a = a > 87.0f ? 87.0f : a;  // written so that NaN stays NaN
    const float shifted = a * -1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
    const float n = shifted - 12582912.0f;
    const float f = (-a - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 0.00139411166f;
    p = p * f + 0.00837513246f;
    p = p * f + 0.0416663513f;
    p = p * f + 0.166664153f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = static_cast<int32_t>(static_cast<uint32_t>(bits) << 23) + 0x3f800000;  // 2^n
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// log(1 + e) for e in [0, 1], relative error 2e-7 also where e is tiny.
inline float log1p_unit(float e) {
    float p = -0.00317605701f;
    p = p * e + 0.0195425283f;
    p = p * e - 0.0563736148f;
    p = p * e + 0.105436236f;
    p = p * e - 0.152696669f;
    p = p * e + 0.196632743f;
    p = p * e - 0.249516159f;
    p = p * e + 0.333297104f;
    p = p * e - 0.499998927f;
    p = p * e + 1.0f;
    return p * e;
}

template <int GAMMA>
inline float focal_power(float s, float gamma) {
    return GAMMA == 2 ? s * s : std::pow(s, gamma);
}

// Linear interpolation with align_corners False: output i reads (1 - weight) of `low` and weight of `high`.
struct Axis {
    std::vector<int> low, high;
    std::vector<float> weight;
    // The transpose: cell j collects outputs first[j] .. first[j] + width with factor[j * width + k].
    std::vector<int> first;
    std::vector<float> factor;
    int width = 1;

    Axis(int cells, int size) : low(size), high(size), weight(size), first(cells, 0) {
        // In double: at odd ratios the position's rounding is the largest error of the whole loss.
        const double scale = static_cast<double>(cells) / size;
        std::vector<int> last(cells, -1);
        std::fill(first.begin(), first.end(), size);
        for (int i = 0; i < size; ++i) {
            const double centre = std::max(0.0, scale * (i + 0.5) - 0.5);
            low[i] = std::min(static_cast<int>(centre), cells - 1);
            high[i] = std::min(low[i] + 1, cells - 1);
            weight[i] = static_cast<float>(std::min(1.0, centre - low[i]));
            for (int cell : {low[i], high[i]}) {
                first[cell] = std::min(first[cell], i);
                last[cell] = std::max(last[cell], i);
            }
        }
        for (int cell = 0; cell < cells; ++cell) width = std::max(width, last[cell] - first[cell] + 1);
        width = (width + 7) / 8 * 8;
        factor.assign(static_cast<size_t>(cells) * width, 0.0f);
        for (int i = 0; i < size; ++i) {
            factor[static_cast<size_t>(low[i]) * width + i - first[low[i]]] += 1.0f - weight[i];
            factor[static_cast<size_t>(high[i]) * width + i - first[high[i]]] += weight[i];
        }
        for (int& start : first) start = std::min(start, size);
    }
};

struct Loss {
    int P, h, w, L, H, W;
    float focal_weight, dice_weight, alpha, gamma;
    int exclude;
};

// Memory of one thread: two upsampled rows, the rows' gradients in work, and the vertical gradient [3][h][W + padding].
struct Workspace {
    std::vector<float> top, bottom, lower, upper, tall, line;
    int span;
    Workspace(const Loss& loss, const Axis& columns)
        : top(loss.W), bottom(loss.W), line(loss.W + columns.width, 0.0f), span(loss.W + columns.width) {
        lower.resize(3 * static_cast<size_t>(span));
        upper.resize(3 * static_cast<size_t>(span));
        tall.resize(3 * static_cast<size_t>(loss.h) * span);
    }
};

struct Sums {
    double focal = 0, mass = 0, inside = 0;
    int64_t size = 0, pixels = 0;
};

void upsample_row(const float* row, const Axis& columns, int W, float* out) {
    const int *low = columns.low.data(), *high = columns.high.data();
    const float* weight = columns.weight.data();
#pragma omp simd
    for (int x = 0; x < W; ++x) out[x] = row[low[x]] + weight[x] * (row[high[x]] - row[low[x]]);
}

// One output row: its sums, and its gradients added to the two source rows it was interpolated from. By u = z (1 - 2t):
// s = sigmoid(u) is the probability of being wrong, softplus(u) the cross-entropy, so inside and outside are one formula.
template <int GAMMA, bool EXCLUDE, bool GRADIENT>
void loss_row(const Loss& loss, const float* top, const float* bottom, float down, const int16_t* map,
              const int16_t* first_layer, int16_t segment, float* lower, float* upper, int span, Sums& sums) {
    const float alpha = loss.alpha, gamma = loss.gamma, keep = 1.0f - down;
    float *lower_d = lower + span, *lower_dt = lower + 2 * span, *upper_d = upper + span, *upper_dt = upper + 2 * span;
    float focal = 0, mass = 0, inside = 0;
    int size = 0, pixels = 0;
#pragma omp simd reduction(+ : focal, mass, inside, size, pixels)
    for (int x = 0; x < loss.W; ++x) {
        const float z = top[x] + down * (bottom[x] - top[x]);
        const bool counted = EXCLUDE ? first_layer[x] != IGNORED : true;
        const bool in = map[x] == segment && counted;
        const float t = in ? 1.0f : 0.0f, valid = counted ? 1.0f : 0.0f;
        const float u = in ? -z : z;
        const float e = exp_minus(std::fabs(u)), r = 1.0f / (1.0f + e);
        const bool positive = u >= 0.0f;
        const float wrong = positive ? r : e * r, right = positive ? e * r : r;
        const float cross_entropy = (positive ? u : 0.0f) + log1p_unit(e);
        const float balance = (in ? alpha : 1.0f - alpha) * valid, power = focal_power<GAMMA>(wrong, gamma) * balance;
        const float probability = (in ? right : wrong) * valid;
        focal += power * cross_entropy;
        mass += probability;
        inside += probability * t;
        size += in;
        pixels += counted;
        if (GRADIENT) {
            const float g = power * (wrong + gamma * cross_entropy * right) * (in ? -1.0f : 1.0f);
            const float d = wrong * right * valid, dt = d * t;
            lower[x] += keep * g;
            lower_d[x] += keep * d;
            lower_dt[x] += keep * dt;
            upper[x] += down * g;
            upper_d[x] += down * d;
            upper_dt[x] += down * dt;
        }
    }
    sums.focal += focal;
    sums.mass += mass;
    sums.inside += inside;
    sums.size += size;
    sums.pixels += pixels;
}

void add_rows(float* tall, const float* rows, int h, int row, int span) {
    for (int kind = 0; kind < 3; ++kind) {
        float* to = tall + (static_cast<size_t>(kind) * h + row) * span;
        const float* from = rows + static_cast<size_t>(kind) * span;
#pragma omp simd
        for (int x = 0; x < span; ++x) to[x] += from[x];
    }
}

// gradient [h,w] from the vertically collected kinds: combine with the pair's factors, then collect over columns.
void collect(const Loss& loss, const Axis& columns, Workspace& work, float of_focal, float of_d, float of_dt,
             float* gradient) {
    const int span = work.span, width = columns.width;
    float* line = work.line.data();  // zeros behind W
    for (int y = 0; y < loss.h; ++y) {
        const float* g = work.tall.data() + static_cast<size_t>(y) * span;
        const float* d = g + static_cast<size_t>(loss.h) * span;
        const float* dt = d + static_cast<size_t>(loss.h) * span;
#pragma omp simd
        for (int x = 0; x < loss.W; ++x) line[x] = of_focal * g[x] + of_d * d[x] + of_dt * dt[x];
        for (int j = 0; j < loss.w; ++j) {
            const float *from = line + columns.first[j], *factor = columns.factor.data() + static_cast<size_t>(j) * width;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int k = 0; k < width; ++k) sum += factor[k] * from[k];
            gradient[static_cast<size_t>(y) * loss.w + j] = sum;
        }
    }
}

template <int GAMMA, bool EXCLUDE, bool GRADIENT>
void one_pair(const Loss& loss, const Axis& rows, const Axis& columns, const float* logits, const int16_t* map,
              const int16_t* first_layer, int16_t segment, float* focal, float* dice, float* gradient, Workspace& work) {
    Sums sums;
    float *top = work.top.data(), *bottom = work.bottom.data(), *lower = work.lower.data(), *upper = work.upper.data();
    const int span = work.span;
    if (GRADIENT) {
        std::fill(work.tall.begin(), work.tall.end(), 0.0f);
        std::fill(work.lower.begin(), work.lower.end(), 0.0f);
        std::fill(work.upper.begin(), work.upper.end(), 0.0f);
    }
    int above = -1, below = -1;
    for (int y = 0; y < loss.H; ++y) {
        if (rows.low[y] != above || rows.high[y] != below) {
            const bool next = rows.low[y] == below && above >= 0;
            if (GRADIENT && above >= 0) {
                add_rows(work.tall.data(), lower, loss.h, above, span);
                if (next) std::swap(lower, upper);
                else add_rows(work.tall.data(), upper, loss.h, below, span);
                std::fill(upper, upper + 3 * static_cast<size_t>(span), 0.0f);
                if (!next) std::fill(lower, lower + 3 * static_cast<size_t>(span), 0.0f);
            }
            if (next) std::swap(top, bottom);
            else upsample_row(logits + static_cast<size_t>(rows.low[y]) * loss.w, columns, loss.W, top);
            upsample_row(logits + static_cast<size_t>(rows.high[y]) * loss.w, columns, loss.W, bottom);
            above = rows.low[y];
            below = rows.high[y];
        }
        const size_t at = static_cast<size_t>(y) * loss.W;
        loss_row<GAMMA, EXCLUDE, GRADIENT>(loss, top, bottom, rows.weight[y], map + at, first_layer + at, segment, lower,
                                           upper, span, sums);
    }
    const double pixels = EXCLUDE ? std::max<double>(1.0, static_cast<double>(sums.pixels)) : double(loss.H) * loss.W;
    const double numerator = 2 * sums.inside + 1, denominator = sums.mass + static_cast<double>(sums.size) + 1;
    *focal = static_cast<float>(sums.focal / pixels);
    *dice = static_cast<float>(1 - numerator / denominator);
    if (GRADIENT) {
        add_rows(work.tall.data(), lower, loss.h, above, span);
        add_rows(work.tall.data(), upper, loss.h, below, span);
        collect(loss, columns, work, static_cast<float>(loss.focal_weight / pixels),
                static_cast<float>(loss.dice_weight * numerator / (denominator * denominator)),
                static_cast<float>(-2 * loss.dice_weight / denominator), gradient);
    }
}

// 0, or 1 when there was no memory for a task: nothing may be thrown into the caller, who is not C++.
template <typename Task>
int deal(int tasks, int threads, Task task) {
    threads = std::max(1, std::min(threads, tasks));
    std::atomic<int> next{0};
    std::atomic<bool> failed{false};
    auto work = [&]() noexcept {
        try {
            auto own = task();
            for (int i = next++; i < tasks; i = next++) own(i);
        } catch (...) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    try {
        others.reserve(static_cast<size_t>(threads));
        for (int i = 1; i < threads; ++i) others.emplace_back(work);
    } catch (...) {
        // The system gives no more threads: fewer do the same work.
    }
    work();
    for (auto& other : others) other.join();
    return failed;
}

using PairKernel = decltype(&one_pair<2, false, false>);

PairKernel pick(bool square, bool exclude, bool gradient) {
    static const PairKernel table[8] = {
        one_pair<0, false, false>, one_pair<0, false, true>, one_pair<0, true, false>, one_pair<0, true, true>,
        one_pair<2, false, false>, one_pair<2, false, true>, one_pair<2, true, false>, one_pair<2, true, true>};
    return table[square * 4 + exclude * 2 + gradient];
}

// Pixels of a block that is summed in fp32 before it goes to double.
constexpr int BLOCK = 512;
constexpr int COLUMNS = 64;

template <int GAMMA>
void sum_columns(const float* logits, int pixels, int stride, int columns, const int16_t* maps, int64_t layer_stride,
                 const int64_t* segment_layer, int L, int T, float alpha, float gamma, int exclude, int64_t N, int first, double* inside_focal,
                 double* inside_mass, double* outside, double* mass, std::vector<float>& block,
                 std::vector<int>& touched, std::vector<char>& is_touched) {
    float D[COLUMNS], S[COLUMNS], F0[COLUMNS], M[COLUMNS];
    for (int start = 0; start < pixels; start += BLOCK) {
        const int stop = std::min(pixels, start + BLOCK);
        std::fill(F0, F0 + COLUMNS, 0.0f);
        std::fill(M, M + COLUMNS, 0.0f);
        touched.clear();
        for (int p = start; p < stop; ++p) {
            const float* row = logits + static_cast<size_t>(p) * stride;
            if (exclude && maps[p] == IGNORED) {
                for (int q = 0; q < columns; ++q) {  // a logit that is not finite is not hidden
                    F0[q] += 0.0f * row[q];
                    M[q] += 0.0f * row[q];
                }
                continue;
            }
#pragma omp simd
            for (int q = 0; q < columns; ++q) {
                const float x = row[q], e = exp_minus(std::fabs(x)), r = 1.0f / (1.0f + e);
                const bool positive = x >= 0.0f;
                const float s = positive ? r : e * r, other = positive ? e * r : r;
                const float tail = log1p_unit(e), of_0 = (positive ? x : 0.0f) + tail, of_1 = (positive ? 0.0f : -x) + tail;
                const float f0 = (1.0f - alpha) * focal_power<GAMMA>(s, gamma) * of_0;
                D[q] = alpha * focal_power<GAMMA>(other, gamma) * of_1 - f0;
                S[q] = s;
                F0[q] += f0;
                M[q] += s;
            }
            for (int layer = 0; layer < L; ++layer) {
                const int segment = maps[layer * layer_stride + p];
                if (segment < 0 || segment >= T || segment_layer[segment] != layer) continue;
                float* sums = block.data() + static_cast<size_t>(segment) * 2 * COLUMNS;
                if (!is_touched[segment]) {
                    is_touched[segment] = 1;
                    touched.push_back(segment);
                    std::fill(sums, sums + 2 * COLUMNS, 0.0f);
                }
#pragma omp simd
                for (int q = 0; q < columns; ++q) {
                    sums[q] += D[q];
                    sums[COLUMNS + q] += S[q];
                }
            }
        }
        for (int q = 0; q < columns; ++q) {
            outside[first + q] += F0[q];
            mass[first + q] += M[q];
        }
        for (int segment : touched) {
            const float* sums = block.data() + static_cast<size_t>(segment) * 2 * COLUMNS;
            double *to_focal = inside_focal + segment * N + first, *to_mass = inside_mass + segment * N + first;
            for (int q = 0; q < columns; ++q) {
                to_focal[q] += sums[q];
                to_mass[q] += sums[COLUMNS + q];
            }
            is_touched[segment] = 0;
        }
    }
}

}  // namespace

extern "C" {

// Both functions return 0, or 1 for want of memory.

// logits, gradient (or null) [B,P,h,w]; map [B,L,H,W]; segments, layers [B,P]; counts [B]; focal, dice [B,P], zeroed.
int mf_mask_loss(const float* logits, const int16_t* map, const int64_t* segments, const int64_t* layers,
                 const int64_t* counts, float* focal, float* dice, float* gradient, int B, int P, int h, int w, int L,
                 int H, int W, float focal_weight, float dice_weight, float alpha, float gamma, int exclude,
                 int threads) try {
    const Loss loss{P, h, w, L, H, W, focal_weight, dice_weight, alpha, gamma, exclude};
    const Axis rows(h, H), columns(w, W);
    const PairKernel kernel = pick(gamma == 2.0f, exclude != 0, gradient != nullptr);
    const size_t plane = static_cast<size_t>(H) * W, cells = static_cast<size_t>(h) * w;
    return deal(B * P, threads, [&] {
        return [&, work = Workspace(loss, columns)](int pair) mutable {
            const int image = pair / P;
            if (pair % P >= counts[image]) return;  // padding
            const int16_t* maps = map + static_cast<size_t>(image) * L * plane;
            kernel(loss, rows, columns, logits + pair * cells, maps + layers[pair] * plane, maps,
                   static_cast<int16_t>(segments[pair]), focal + pair, dice + pair,
                   gradient ? gradient + pair * cells : nullptr, work);
        };
    });
} catch (...) {
    return 1;
}

// Adds to the sums of one image: logits [pixels,N], maps: L planes of which pixels are read from `maps` on,
// layer_stride apart; segment_layer [T]: a segment is counted in its own plane alone. inside_* [T,N], outside and
// mass [N], all double.
int mf_pair_sums(const float* logits, int pixels, int64_t N, const int16_t* maps, int64_t layer_stride,
                 const int64_t* segment_layer, int L, int T, float alpha, float gamma, int exclude,
                 double* inside_focal, double* inside_mass, double* outside, double* mass, int threads) try {
    const int tiles = static_cast<int>((N + COLUMNS - 1) / COLUMNS);
    return deal(tiles, threads, [&] {
        return [&, block = std::vector<float>(static_cast<size_t>(std::max(T, 1)) * 2 * COLUMNS),
                touched = std::vector<int>(), is_touched = std::vector<char>(std::max(T, 1), 0)](int tile) mutable {
            const int first = tile * COLUMNS, columns = static_cast<int>(std::min<int64_t>(COLUMNS, N - first));
            const auto kernel = gamma == 2.0f ? sum_columns<2> : sum_columns<0>;
            kernel(logits + first, pixels, static_cast<int>(N), columns, maps, layer_stride, segment_layer, L, T, alpha,
                   gamma, exclude, N, first, inside_focal, inside_mass, outside, mass, block, touched, is_touched);
        };
    });
} catch (...) {
    return 1;
}
}
