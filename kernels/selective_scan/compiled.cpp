// The selective scan for a CPU: channels in the lanes of vectors, token after token in registers and cache.
//
// B batch, L length, E channels, N states, W lanes, T tokens of a chunk, G chunks, K blocks of W channels.
// States travel packed, (K, N, W); lanes beyond E hold zeros. a comes as a / ln 2: exp(dt a) = 2^(dt a).
// Plain C functions at the end, called through ctypes (compiled.py): no header of torch, a build of seconds.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Bytes of a vector: what the machine has. At most VECTOR_BYTES of compiled.py.
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif

namespace {

struct Sizes {
    int64_t batch, length, channels, states, chunk, threads, groups;
    int64_t blocks, chunks;
};

// An input (B, L, ...) with any stride of rows and of tokens; what a token has lies together.
template <typename T> struct Tokens {
    const T* data;
    int64_t row, token;
    const T* operator()(int64_t r, int64_t t) const { return data + r * row + t * token; }
};

template <typename T> struct Format;

template <> struct Format<float> {
    typedef float Vector __attribute__((vector_size(VECTOR)));
    typedef int32_t Bits __attribute__((vector_size(VECTOR)));
    static constexpr int lanes = VECTOR / sizeof(float), degree = 6;
    static constexpr int mantissa = 23, lowest = -125, highest = 128;
    static constexpr float rounding = 12582912.0f;  // 1.5 * 2^23: a sum ends in the bits of the nearest integer
    static constexpr float powers[] = {1.0f,          0.693147203f,   0.240226479f,  0.0555033247f,
                                       0.00961843737f, 0.00133988749f, 0.000153533606f};
};

template <> struct Format<double> {
    typedef double Vector __attribute__((vector_size(VECTOR)));
    typedef int64_t Bits __attribute__((vector_size(VECTOR)));
    static constexpr int lanes = VECTOR / sizeof(double), degree = 13;
    static constexpr int mantissa = 52, lowest = -1021, highest = 1024;
    static constexpr double rounding = 6755399441055744.0;
    static constexpr double powers[] = {
        1.0,
        0.6931471805599453,
        0.2402265069591007,
        0.05550410866482158,
        0.009618129107628477,
        0.0013333558146428441,
        0.00015403530393381606,
        1.5252733804059838e-05,
        1.3215486790144305e-06,
        1.0178086009239696e-07,
        7.054911620801121e-09,
        4.44553827187081e-10,
        2.5678435993488196e-11,
        1.3691488853904124e-12,
    };
};

template <typename T> using Vector = typename Format<T>::Vector;

// 2^x: 2^n 2^r with the nearest integer n. 0 below the normal numbers, inf above them, NaN for NaN.
template <typename T> inline Vector<T> exp2(Vector<T> x) {
    using F = Format<T>;
    using Bits = typename F::Bits;
    Vector<T> shifted = x + F::rounding;
    Vector<T> r = x - (shifted - F::rounding);
    Vector<T> p = r * F::powers[F::degree] + F::powers[F::degree - 1];
    for (int k = F::degree - 2; k >= 0; --k) p = p * r + F::powers[k];
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    Bits value;
    std::memcpy(&value, &p, sizeof value);
    value += bits << F::mantissa;
    Vector<T> result;
    std::memcpy(&result, &value, sizeof result);
    result = x < T(F::highest) ? result : x * std::numeric_limits<T>::infinity();
    return x < T(F::lowest) ? Vector<T>{} : result;
}

template <typename T> inline Vector<T> load(const T* from, int64_t lanes) {
    Vector<T> v{};
    if (lanes >= Format<T>::lanes) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, lanes * sizeof(T));
    return v;
}

template <typename T> inline void store(T* to, Vector<T> v, int64_t lanes) {
    if (lanes >= Format<T>::lanes) std::memcpy(to, &v, sizeof v);
    else std::memcpy(to, &v, lanes * sizeof(T));
}

template <typename T> inline T sum(const Vector<T>& v) {
    T part[Format<T>::lanes];
    std::memcpy(part, &v, sizeof part);
    for (int half = Format<T>::lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

// (E, N) to (K, N, W) and back, for the blocks from first to last.
template <typename T> void pack(const T* from, Vector<T>* to, const Sizes& s, int64_t first, int64_t last) {
    constexpr int lanes = Format<T>::lanes;
    for (int64_t k = first; k < last; ++k)
        for (int64_t n = 0; n < s.states; ++n) {
            T part[lanes] = {};
            for (int64_t i = 0; i < std::min<int64_t>(lanes, s.channels - k * lanes); ++i)
                part[i] = from[(k * lanes + i) * s.states + n];
            std::memcpy(&to[(k - first) * s.states + n], part, sizeof part);
        }
}

template <typename T> void unpack(const Vector<T>* from, T* to, const Sizes& s, int64_t first, int64_t last) {
    constexpr int lanes = Format<T>::lanes;
    for (int64_t k = first; k < last; ++k)
        for (int64_t n = 0; n < s.states; ++n) {
            T part[lanes];
            std::memcpy(part, &from[(k - first) * s.states + n], sizeof part);
            for (int64_t i = 0; i < std::min<int64_t>(lanes, s.channels - k * lanes); ++i)
                to[(k * lanes + i) * s.states + n] = part[i];
        }
}

// std::vector of vectors whose alignment is beyond that of malloc: aligned by C++17's operator new.
template <typename T> using Buffer = std::vector<Vector<T>>;

// The tasks: rows x groups of blocks, each a contiguous range, done by as many threads.
template <typename Task> void each_task(const Sizes& s, const Task& task) {
    const int64_t rows = std::min(s.batch, s.threads), tasks = rows * s.groups;
    auto run = [&](int64_t i) {
        const int64_t r = i / s.groups, g = i % s.groups;
        const int64_t first = s.blocks * g / s.groups, end = s.blocks * (g + 1) / s.groups;
        task(r, g, s.batch * r / rows, s.batch * (r + 1) / rows, first, end);
    };
#ifdef _OPENMP
#pragma omp parallel for num_threads(int(s.threads)) schedule(static) if (s.threads > 1)
#endif
    for (int64_t i = 0; i < tasks; ++i) run(i);
}

template <typename T>
void forward(const Sizes& s, Tokens<T> u, Tokens<T> dt, const T* a, Tokens<T> b, Tokens<T> c, const T* initial,
             T* y, T* saved, T* last) {
    constexpr int lanes = Format<T>::lanes;
    const int64_t N = s.states;
    each_task(s, [&](int64_t, int64_t, int64_t row, int64_t row_end, int64_t first, int64_t end) {
        const int64_t size = (end - first) * N;
        Buffer<T> rate(size), state(size);
        pack(a, rate.data(), s, first, end);
        for (; row < row_end; ++row) {
            pack(initial + row * s.channels * N, state.data(), s, first, end);
            for (int64_t g = 0; g < s.chunks; ++g) {
                const int64_t from = g * s.chunk, to = std::min(s.length, from + s.chunk);
                T* kept = saved + ((row * s.chunks + g) * s.blocks + first) * N * lanes;
                std::memcpy(kept, state.data(), size * sizeof(Vector<T>));
                for (int64_t k = first; k < end; ++k) {
                    const int64_t at = k * lanes, width = s.channels - at;
                    Vector<T>* h = &state[(k - first) * N];
                    const Vector<T>* ak = &rate[(k - first) * N];
                    for (int64_t t = from; t < to; ++t) {
                        const Vector<T> step = load(dt(row, t) + at, width);
                        const Vector<T> in = step * load(u(row, t) + at, width);
                        const T *bt = b(row, t), *ct = c(row, t);
                        Vector<T> out{};
                        for (int64_t n = 0; n < N; ++n) {
                            h[n] = exp2<T>(step * ak[n]) * h[n] + in * bt[n];
                            out += h[n] * ct[n];
                        }
                        store(y + (row * s.length + t) * s.channels + at, out, width);
                    }
                }
            }
            unpack(state.data(), last + row * s.channels * N, s, first, end);
        }
    });
}

// Chunks from the last to the first: the states again, from the one saved, then the gradients from the end.
// da: (rows of tasks, E, N), sums over their rows; db, dc: (groups, B, L, N), sums over their channels.
template <typename T>
void backward(const Sizes& s, Tokens<T> dy, const T* dlast, Tokens<T> u, Tokens<T> dt, const T* a, Tokens<T> b,
              Tokens<T> c, const T* saved, T* du, T* ddt, T* da, T* db, T* dc, T* dinitial) {
    constexpr int lanes = Format<T>::lanes;
    const int64_t N = s.states;
    const T ln2 = T(0.6931471805599453);
    each_task(s, [&](int64_t part, int64_t group, int64_t row, int64_t row_end, int64_t first, int64_t end) {
        const int64_t size = (end - first) * N;
        Buffer<T> rate(size), grad_rate(size), carried(size);
        Buffer<T> states((s.chunk + 1) * N), decays(s.chunk * N), sum_b(s.chunk * N), sum_c(s.chunk * N);
        pack(a, rate.data(), s, first, end);
        for (; row < row_end; ++row) {
            pack(dlast + row * s.channels * N, carried.data(), s, first, end);
            for (int64_t g = s.chunks - 1; g >= 0; --g) {
                const int64_t from = g * s.chunk, size_g = std::min(s.length, from + s.chunk) - from;
                std::fill(sum_b.begin(), sum_b.begin() + size_g * N, Vector<T>{});
                std::fill(sum_c.begin(), sum_c.begin() + size_g * N, Vector<T>{});
                for (int64_t k = first; k < end; ++k) {
                    const int64_t at = k * lanes, width = s.channels - at;
                    const Vector<T>* ak = &rate[(k - first) * N];
                    const T* kept = saved + ((row * s.chunks + g) * s.blocks + k) * N * lanes;
                    std::memcpy(states.data(), kept, N * sizeof(Vector<T>));
                    for (int64_t t = 0; t < size_g; ++t) {
                        const int64_t i = from + t;
                        const Vector<T> step = load(dt(row, i) + at, width);
                        const Vector<T> in = step * load(u(row, i) + at, width);
                        const T* bt = b(row, i);
                        const Vector<T>* before = &states[t * N];
                        Vector<T>*h = &states[(t + 1) * N], *decay = &decays[t * N];
                        for (int64_t n = 0; n < N; ++n) {
                            decay[n] = exp2<T>(step * ak[n]);
                            h[n] = decay[n] * before[n] + in * bt[n];
                        }
                    }
                    Vector<T>*q = &carried[(k - first) * N], *da_k = &grad_rate[(k - first) * N];
                    for (int64_t t = size_g - 1; t >= 0; --t) {
                        const int64_t i = from + t;
                        const Vector<T> step = load(dt(row, i) + at, width), x = load(u(row, i) + at, width);
                        const Vector<T> out = load(dy(row, i) + at, width), in = step * x;
                        const T *bt = b(row, i), *ct = c(row, i);
                        const Vector<T>*before = &states[t * N], *h = before + N, *decay = &decays[t * N];
                        Vector<T>*to_b = &sum_b[t * N], *to_c = &sum_c[t * N];
                        Vector<T> through_a{}, through_b{};
                        for (int64_t n = 0; n < N; ++n) {
                            const Vector<T> grad = q[n] + out * ct[n];  // of h_t
                            to_c[n] += h[n] * out;
                            to_b[n] += grad * in;
                            through_b += grad * bt[n];
                            q[n] = grad * decay[n];
                            const Vector<T> w = q[n] * before[n];  // of dt a
                            through_a += w * ak[n];
                            da_k[n] += w * step;
                        }
                        const int64_t place = (row * s.length + i) * s.channels + at;
                        store<T>(du + place, through_b * step, width);
                        store<T>(ddt + place, through_a * ln2 + through_b * x, width);
                    }
                }
                const int64_t place = ((group * s.batch + row) * s.length + from) * N;
                for (int64_t i = 0; i < size_g * N; ++i) {
                    db[place + i] = sum<T>(sum_b[i]);
                    dc[place + i] = sum<T>(sum_c[i]);
                }
            }
            unpack(carried.data(), dinitial + row * s.channels * N, s, first, end);
        }
        unpack(grad_rate.data(), da + part * s.channels * N, s, first, end);
    });
}

Sizes read_sizes(const int64_t* given, int64_t lanes) {
    Sizes s{given[0], given[1], given[2], given[3], given[4], given[5], given[6], 0, 0};
    s.blocks = (s.channels + lanes - 1) / lanes;
    s.chunks = (s.length + s.chunk - 1) / s.chunk;
    return s;
}

template <typename T> void run_forward(const int64_t* sizes, const int64_t* strides, T** t) {
    const Sizes s = read_sizes(sizes, Format<T>::lanes);
    auto tokens = [&](int tensor, int i) { return Tokens<T>{t[tensor], strides[2 * i], strides[2 * i + 1]}; };
    forward<T>(s, tokens(0, 0), tokens(1, 1), t[2], tokens(3, 2), tokens(4, 3), t[5], t[6], t[7], t[8]);
}

template <typename T> void run_backward(const int64_t* sizes, const int64_t* strides, T** t) {
    const Sizes s = read_sizes(sizes, Format<T>::lanes);
    auto tokens = [&](int tensor, int i) { return Tokens<T>{t[tensor], strides[2 * i], strides[2 * i + 1]}; };
    backward<T>(s, tokens(0, 4), t[1], tokens(2, 0), tokens(3, 1), t[4], tokens(5, 2), tokens(6, 3), t[7], t[8],
                t[9], t[10], t[11], t[12], t[13]);
}

}  // namespace

// sizes: B, L, E, N, T, threads, groups. strides: of rows and tokens, of u, dt, b, c (and dy).
// t: the tensors, in the order of the arguments of the functions above.
extern "C" {
void forward_float(const int64_t* sizes, const int64_t* strides, float** t) { run_forward(sizes, strides, t); }
void forward_double(const int64_t* sizes, const int64_t* strides, double** t) { run_forward(sizes, strides, t); }
void backward_float(const int64_t* sizes, const int64_t* strides, float** t) { run_backward(sizes, strides, t); }
void backward_double(const int64_t* sizes, const int64_t* strides, double** t) { run_backward(sizes, strides, t); }
}
