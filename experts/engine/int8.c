/* One pass of a Llama-like decoder over a packed batch, on int8 weights, with a LoRA adapter for each sequence.
 *
 * Weights are int8 with a scale for every GROUP inputs of an output; activations are quantised as they come, with a scale for
 * every GROUP values of a row. Sums inside a group are integers, so they are exact, and nothing that one row computes depends
 * on another: a sequence gets the same bits whatever else is in the batch, however its prompt was cut.
 *
 * A matrix is stored in tiles of 32 outputs (16 where it has no more), each one stream of memory: for every group of inputs,
 * GROUP / 4 steps of [outputs][4 inputs] bytes, offset by 128 as the instruction wants them, then the scales in bfloat16.
 *
 * Threads take items (a tile, some rows, some heads) from a shared ticket, so a core that is taken away delays little.
 * Vectors are those of the compiler (GCC or Clang); only the dot product has an instruction of its own where there is one.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { GROUP = 64, PAGE = 16, ROWS = 8, QUERIES = 8, BLOCK = 4, PARTS = 3, LINEARS = 4, MODULES = 7, MAX_RANK = 256 };
enum { QKV, OUT, GATE_UP, DOWN };
enum { AHEAD = 8192 }; /* bytes that are fetched before they are used: one core's share of the memory's latency */

typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
typedef uint8_t bytes __attribute__((vector_size(64), aligned(1)));

#define INLINE static inline __attribute__((always_inline))
#define ROUND(n, to) (((n) + (to) - 1) / (to) * (to))

/* ---- vectors of 16 ---- */

INLINE floats splat(float x) { return (floats){0} + x; }
INLINE floats from_bf16(const uint16_t *p) {
#if defined(__AVX512F__) /* GCC 12 converts half by half */
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    return (floats)(__builtin_convertvector(*(const halves *)p, words) << 16);
#endif
}
/* Zero where x is not finite: whoever gets the page next multiplies what is left there with zero. */
INLINE uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7f80) == 0x7f80 ? 0 : (uint16_t)u;
}
INLINE floats choose(ints where, floats yes, floats no) { return (floats)(((ints)yes & where) | ((ints)no & ~where)); }
INLINE floats at_least(floats v, float low) { return choose(v > splat(low), v, splat(low)); }
#if defined(__clang__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else /* GCC has that from 12 on */
#define SHUFFLE(v, ...) __builtin_shuffle(v, (ints){__VA_ARGS__})
#endif
#define FOLD(v, combine)                                                                          \
    v = combine(v, SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));             \
    v = combine(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));             \
    v = combine(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));             \
    v = combine(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }
INLINE floats plus(floats a, floats b) { return a + b; }
INLINE float sum16(floats v) {
    FOLD(v, plus)
    return v[0];
}
INLINE float max16(floats v) {
    FOLD(v, larger)
    return v[0];
}
/* e^x to 2e-7, for x in [-87, 88] (Cephes): 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE floats exp16(floats x) {
    x = -at_least(-at_least(x, -87.0f), -88.0f);
    const ints power = __builtin_convertvector(x * 1.44269504f + 128.5f, ints) - 128; /* rounds: the sum is positive */
    const floats n = __builtin_convertvector(power, floats);
    floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((ints)p + (power << 23));
}

/* ---- the dot product, in the widest registers that have one ---- */

#if defined(__AVX512BW__)
enum { WIDE = 16, TOGETHER = 8 };
#elif defined(__AVX2__)
enum { WIDE = 8, TOGETHER = 2 };
#else
enum { WIDE = 4, TOGETHER = 1 };
#endif
/* A register of WIDE numbers; TOGETHER rows fit in all that there are. */
typedef float wide_floats __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef int32_t wide_ints __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef uint32_t wide_words __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef uint16_t wide_halves __attribute__((vector_size(2 * WIDE), aligned(2)));
typedef int16_t shorts __attribute__((vector_size(4 * WIDE), aligned(2)));

/* total[i] += sum of w[4 i + j] * x[j], j < 4: unsigned times signed bytes. Exact in every variant. */
INLINE wide_ints dot4(wide_ints total, wide_ints w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (wide_ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
    return (wide_ints)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(total, (uint8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x)), half = vdupq_n_s8(64); /* bytes less 128, and 2 * 64 */
    total += vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, four), half, four);
    return vdotq_s32(total, (int8x16_t)((uint8x16_t)w ^ 128), four);
#else
    const shorts pairs = (shorts)((wide_ints){0} + x);
    const shorts even = pairs << 8 >> 8, odd = pairs >> 8; /* as shorts */
    const shorts low = (shorts)w & 255, high = (shorts)((wide_words)w >> 8) & 255;
#if defined(__AVX512BW__)
    const __m512i a = _mm512_madd_epi16((__m512i)low, (__m512i)even), b = _mm512_madd_epi16((__m512i)high, (__m512i)odd);
    return total + ((wide_ints)a + (wide_ints)b);
#elif defined(__AVX2__)
    const __m256i a = _mm256_madd_epi16((__m256i)low, (__m256i)even), b = _mm256_madd_epi16((__m256i)high, (__m256i)odd);
    return total + ((wide_ints)a + (wide_ints)b);
#elif defined(__SSE2__)
    const __m128i a = _mm_madd_epi16((__m128i)low, (__m128i)even), b = _mm_madd_epi16((__m128i)high, (__m128i)odd);
    return total + ((wide_ints)a + (wide_ints)b);
#else
    for (int i = 0; i < 2 * WIDE; i++) total[i / 2] += low[i] * even[i] + high[i] * odd[i];
    return total;
#endif
#endif
}
INLINE wide_floats wide_from_bf16(const uint16_t *p) {
#if defined(__AVX512BW__)
    return from_bf16(p);
#else
    return (wide_floats)(__builtin_convertvector(*(const wide_halves *)p, wide_words) << 16);
#endif
}

/* ---- threads ---- */

/* What is left to do in a phase: its number, how many items it has, and the next item, in one word, so that a thread that
 * was away cannot take an item of a phase that has gone. */
typedef uint64_t Ticket;
#define ITEM_BITS 24
#define PHASES (1u << (64 - 2 * ITEM_BITS))
#define ITEM_MASK ((1u << ITEM_BITS) - 1)

typedef struct Step Step;
typedef void Work(Step *, int item, int thread);

typedef struct {
    pthread_t *threads;
    int count;
    _Alignas(64) _Atomic Ticket ticket;
    _Alignas(64) atomic_int done;
    _Alignas(64) atomic_int awake; /* 1 within a pass, -1 to end */
    Work *work;
    Step *step;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint64_t phase;
} Pool;

typedef struct {
    Pool *pool;
    int number;
} Worker;

INLINE void relax(int *spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (++*spins > 2000) sched_yield(); /* more threads than cores: let the others work */
}

/* Take items of the present phase until none is left; returns its number. */
static uint64_t take_items(Pool *pool, int thread) {
    for (;;) {
        Ticket t = atomic_fetch_add(&pool->ticket, 1);
        uint32_t item = t & ITEM_MASK, items = (t >> ITEM_BITS) & ITEM_MASK;
        if (item >= items) return t >> (2 * ITEM_BITS);
        pool->work(pool->step, (int)item, thread);
        atomic_fetch_add(&pool->done, 1);
    }
}

static void *worker(void *argument) {
    Worker me = *(Worker *)argument;
    Pool *pool = me.pool;
    free(argument);
    for (;;) {
        pthread_mutex_lock(&pool->lock);
        while (!atomic_load(&pool->awake)) pthread_cond_wait(&pool->wake, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
        while (atomic_load(&pool->awake) == 1) {
            uint64_t phase = take_items(pool, me.number);
            int spins = 0;
            while (atomic_load(&pool->ticket) >> (2 * ITEM_BITS) == phase && atomic_load(&pool->awake) == 1) relax(&spins);
        }
        if (atomic_load(&pool->awake) < 0) return NULL;
    }
}

static void parallel(Pool *pool, Work *work, int items) {
    pool->work = work;
    atomic_store(&pool->done, 0);
    pool->phase = (pool->phase + 1) % PHASES;
    atomic_store(&pool->ticket, (Ticket)pool->phase << (2 * ITEM_BITS) | (Ticket)items << ITEM_BITS);
    take_items(pool, 0);
    int spins = 0;
    while (atomic_load(&pool->done) < items) relax(&spins);
}

static void set_awake(Pool *pool, int state) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->awake, state);
    if (state) pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

/* ---- matrices ---- */

INLINE int group_of(int in) { return in < GROUP ? ROUND(in, 4) : GROUP; }
INLINE int groups_of(int in) { return (in + GROUP - 1) / GROUP; }
INLINE int padded(int in) { return groups_of(in) * group_of(in); }
INLINE int tile_of(int out) { return out > 16 ? 32 : 16; }
INLINE int tiles_of(int out) { return (out + tile_of(out) - 1) / tile_of(out); }
INLINE int stored(int out) { return tiles_of(out) * tile_of(out); }
INLINE size_t tile_bytes(int out, int in) { return (size_t)groups_of(in) * (group_of(in) + 2) * tile_of(out); }

size_t matrix_bytes(int out, int in) { return tiles_of(out) * tile_bytes(out, in); }

/* Below this, a group counts as zero: the inverse of its scale would be infinite. */
#define LEAST 1e-30f

/* Pack `count` inputs of one output: `to` is its first byte, four follow each other and then `step` later.
 * Returns 0 where one of them is not finite. */
static int pack_group(uint8_t *to, int step, uint16_t *scale, const float *row, int count) {
    int32_t bits, most = 0; /* without the sign, bits are in the order of the numbers: infinity and NaN are the last */
    for (int i = 0; i < count; i++) {
        memcpy(&bits, row + i, 4);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    if (most >= 0x7f800000) return 0;
    /* The scale is rounded before it is used, so that its own rounding costs nothing; up, so that 127 suffices. */
    float rounded;
    memcpy(&rounded, &most, 4);
    rounded /= 127.0f;
    memcpy(&bits, &rounded, 4);
    bits = (bits + 0xffff) & ~0xffff;
    memcpy(&rounded, &bits, 4);
    *scale = (uint16_t)(bits >> 16);
    const float inverse = rounded > LEAST ? 1 / rounded : 0;
    for (int i = 0; i < count; i++) to[i / 4 * step + i % 4] = (uint8_t)(128 + (int)rintf(row[i] * inverse));
    return 1;
}

/* Pack a tile of `count` rows, zeros for those that are NULL. Returns 0 where a number is not finite. */
static int pack_tile(uint8_t *to, int tile, const float *const *rows, int count, int in) {
    const int group = group_of(in);
    int finite = 1;
    for (int g = 0; g < groups_of(in); g++, to += (group + 2) * tile) {
        const int left = in - g * group;
        uint16_t *scales = (uint16_t *)(to + group * tile);
        memset(to, 128, (size_t)group * tile);
        memset(scales, 0, sizeof(*scales) * tile);
        for (int o = 0; o < tile && o < count; o++)
            if (rows[o])
                finite &= pack_group(to + 4 * o, 4 * tile, scales + o, rows[o] + g * group, left < group ? left : group);
    }
    return finite;
}

/* Pack a matrix [out][in]. Returns 0 where a number is not finite. */
int matrix_pack(uint8_t *to, const float *from, int out, int in) {
    const float *rows[32];
    const int tile = tile_of(out);
    int finite = 1;
    for (int first = 0; first < out; first += tile, to += tile_bytes(out, in)) {
        for (int o = 0; o < tile && first + o < out; o++) rows[o] = from + (size_t)(first + o) * in;
        finite &= pack_tile(to, tile, rows, out - first, in);
    }
    return finite;
}

/* Rows of activations as bytes: `stride` values a row, a scale and a correction for each group. The correction,
 * -128 times the group's sum, undoes the offset of the weights. */
typedef struct {
    int8_t *values;
    float *scales;
    int32_t *corrections;
    int stride, groups;
} Quantised;

/* Quantise `count` values of `x` into group `g` of a row that starts at `values`; what is beyond `count` is zero. */
INLINE void quantise_group(int8_t *values, float *scale, int32_t *correction, const float *x, int count, int group) {
    float most = 0;
    for (int i = 0; i < count; i++) most = fmaxf(most, fabsf(x[i]));
    const float inverse = most > LEAST ? 127.0f / most : 0;
    int32_t total = 0;
    for (int i = 0; i < count; i++) {
        int32_t v = (int32_t)rintf(x[i] * inverse);
        values[i] = (int8_t)v;
        total += v;
    }
    for (int i = count; i < group; i++) values[i] = 0;
    *scale = most / 127.0f;
    *correction = -128 * total;
}

/* Where a linear's inputs stand in quantised rows. */
typedef struct {
    int32_t value, group;
} Place;

static void quantise(const Quantised *to, int row, Place place, const float *x, int in) {
    const int group = group_of(in);
    for (int g = 0; g < groups_of(in); g++) {
        const int at = row * to->groups + place.group + g, left = in - g * group;
        quantise_group(to->values + (size_t)row * to->stride + place.value + g * group, to->scales + at, to->corrections + at,
                       x + g * group, left < group ? left : group, group);
    }
}

typedef int32_t wide_ints_any __attribute__((vector_size(4 * WIDE), aligned(1)));
/* y[m] (+)= one tile, of `vectors` times 16 outputs, times x[m], for some rows from `row`. */
INLINE void tile_rows(const uint8_t *w, const Quantised *x, int row, Place place, int in, float *y, int stride, int add,
                      const float *bias, const int rows, const int vectors, const int group) {
    const int8_t *values = x->values + (size_t)row * x->stride + place.value;
    const float *scales = x->scales + row * x->groups + place.group;
    const int32_t *corrections = x->corrections + row * x->groups + place.group;
    enum { MOST = 32 / WIDE };
    const int parts = vectors * 16 / WIDE;
    wide_floats sum[TOGETHER][MOST];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < parts; v++) sum[m][v] = bias ? *(const wide_floats *)(bias + WIDE * v) : (wide_floats){0};
    for (int g = 0; g < groups_of(in); g++, values += group) {
        wide_ints acc[TOGETHER][MOST];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < parts; v++) acc[m][v] = (wide_ints){0} + corrections[m * x->groups + g];
        for (int k = 0; k < group; k += 4, w += 64 * vectors) {
            wide_ints weights[MOST];
            for (int v = 0; v < parts; v++) {
                weights[v] = *(const wide_ints_any *)(w + 4 * WIDE * v);
                if (v % (64 / (4 * WIDE)) == 0) __builtin_prefetch(w + 4 * WIDE * v + AHEAD);
            }
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, values + (size_t)m * x->stride + k, 4);
                for (int v = 0; v < parts; v++) acc[m][v] = dot4(acc[m][v], weights[v], four);
            }
        }
        for (int v = 0; v < parts; v++, w += 2 * WIDE) {
            const wide_floats scale = wide_from_bf16((const uint16_t *)w);
            for (int m = 0; m < rows; m++)
                sum[m][v] += __builtin_convertvector(acc[m][v], wide_floats) * (scale * scales[m * x->groups + g]);
        }
    }
    for (int m = 0; m < rows; m++, y += stride)
        for (int v = 0; v < parts; v++) {
            wide_floats *to = (wide_floats *)(y + WIDE * v);
            *to = add ? *to + sum[m][v] : sum[m][v];
        }
}

/* y (+)= one tile of a matrix [out][in] times some rows of x. The loops over rows, vectors and group are of fixed length
 * inside, so that all sums stay in registers. */
static void multiply(const uint8_t *matrix, int out, int in, int tile, const Quantised *x, int row, int rows, Place place,
                     float *y, int stride, int add, const float *bias) {
    const uint8_t *w = matrix + tile * tile_bytes(out, in);
    const int narrow = tile_of(out) == 16, group = group_of(in);
    for (const int last = row + rows; row < last; row += TOGETHER, y += (size_t)TOGETHER * stride) {
#define CASE(n)                                                                                      \
    case n:                                                                                          \
        if (narrow) tile_rows(w, x, row, place, in, y, stride, add, bias, n, 1, group);              \
        else if (group == GROUP) tile_rows(w, x, row, place, in, y, stride, add, bias, n, 2, GROUP); \
        else tile_rows(w, x, row, place, in, y, stride, add, bias, n, 2, group);                     \
        break;
        switch (last - row < TOGETHER ? last - row : TOGETHER) {
            CASE(1)
#if defined(__AVX2__)
            CASE(2)
#endif
#if defined(__AVX512BW__)
            CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#endif
        }
#undef CASE
    }
}

/* ---- the model ---- */

typedef struct {
    int in, parts, outs[PARTS]; /* the parts share an input: q, k, v, or gate and up */
    const uint8_t *weights[PARTS];
    const float *bias; /* of all parts, each in whole tiles; or NULL */
} Linear;

typedef struct {
    Linear linears[LINEARS];
    const float *norms[2];        /* before attention, before the feed-forward net */
    const float *head_norms[2];   /* of q and k, or NULL */
} Layer;

typedef struct {
    int32_t ranks[PARTS], width; /* rank 0: no adapter here */
    Place places[PARTS];         /* of a part among A's outputs */
    const uint8_t *a, *b[PARTS];
} LoraLinear;

typedef struct {
    int layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, context, pages, most_tokens, slots;
    float eps;
    const float *cosines, *sines; /* [context][head_dim / 2] */
    const uint16_t *embeddings;   /* [vocab][hidden] bfloat16 */
    const float *last_norm;
    Linear head;
    Layer *layer;
    uint16_t *cache;         /* keys and values, [layers][pages][kv_heads]; see page_of */
    LoraLinear **adapters;   /* [slots + 1], each [layers][LINEARS] or NULL */
    Pool *pool;
} Model;

typedef struct {
    int first, count, key; /* key: an adapter slot, or a sequence */
} Span;

struct Step {
    const Model *model;
    const int32_t *tokens, *positions, *sequence, *pages, *slots, *wanted;
    int count, most_pages, wanted_count, layer, linear, spans_count, queries_count;
    int qkv_stride, hidden_stride, attended_stride, gate_stride, low_stride;
    Span *spans, *queries;
    float *x, *qkv, *attended, *gate_up, *low, *logits;
    float *scratch; /* a row of floats for each thread */
    size_t scratch_floats;
    Quantised quantised, low_quantised;
};

INLINE int tiles(const Linear *linear) {
    int total = 0;
    for (int p = 0; p < linear->parts; p++) total += tiles_of(linear->outs[p]);
    return total;
}
INLINE int outputs(const Linear *linear) {
    int total = 0;
    for (int p = 0; p < linear->parts; p++) total += stored(linear->outs[p]);
    return total;
}

static void rms_norm(float *to, const float *x, const float *weight, int n, float eps) {
    floats squares = {0};
    float total = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) squares += *(const floats *)(x + i) * *(const floats *)(x + i);
    for (; i < n; i++) total += x[i] * x[i];
    const float scale = 1 / sqrtf((total + sum16(squares)) / n + eps);
    for (i = 0; i < n; i++) to[i] = x[i] * scale * weight[i];
}

/* What a linear reads: the normed stream, the heads' outputs, or silu(gate) * up. */
static const float *input_of(const Step *s, int row, float *scratch) {
    const Model *m = s->model;
    if (s->linear == OUT) return s->attended + (size_t)row * s->attended_stride;
    if (s->linear == DOWN) {
        const float *gate = s->gate_up + (size_t)row * s->gate_stride;
        const float *up = gate + stored(m->intermediate);
        for (int i = 0; i < m->intermediate; i += 16) { /* both lie in whole tiles */
            const floats g = *(const floats *)(gate + i);
            *(floats *)(scratch + i) = g / (1.0f + exp16(-g)) * *(const floats *)(up + i);
        }
        return scratch;
    }
    const float *weight = s->layer < m->layers ? m->layer[s->layer].norms[s->linear == GATE_UP] : m->last_norm;
    rms_norm(scratch, s->x + (size_t)row * s->hidden_stride, weight, m->hidden, m->eps);
    return scratch;
}

/* Where a linear's outputs go, and how far its rows are apart; added to what is there for the two that end a block. */
typedef struct {
    float *y;
    int stride, add;
} Target;

INLINE Target target_of(const Step *s, int linear) {
    const Target targets[LINEARS] = {{s->qkv, s->qkv_stride, 0},
                                     {s->x, s->hidden_stride, 1},
                                     {s->gate_up, s->gate_stride, 0},
                                     {s->x, s->hidden_stride, 1}};
    return targets[linear];
}

/* Add B's share to the outputs of a linear, for rows of one adapter. Whoever reads these rows next does it first: so B is
 * read in one stream, and no other thread waits for it. */
static void add_low(const Step *s, int layer, int l, int first, int count, int slot) {
    if (!s->model->adapters[slot]) return;
    const Linear *linear = &s->model->layer[layer].linears[l];
    const LoraLinear *lora = s->model->adapters[slot] + layer * LINEARS + l;
    const Target target = target_of(s, l);
    float *y = target.y + (size_t)first * target.stride;
    for (int p = 0; p < linear->parts; y += stored(linear->outs[p++])) {
        const int out = linear->outs[p], rank = lora->ranks[p];
        for (int tile = 0; rank && tile < tiles_of(out); tile++)
            multiply(lora->b[p], out, rank, tile, &s->low_quantised, first, count, lora->places[p], y + tile * tile_of(out),
                     target.stride, 1, NULL);
    }
}

/* Rows of one adapter: their input as bytes, and its product with A as bytes. */
static void read_rows(Step *s, int item, int thread) {
    const Span span = s->spans[item];
    const Model *m = s->model;
    float *scratch = s->scratch + thread * s->scratch_floats;
    const int in = m->layer[s->layer].linears[s->linear].in;
    if (s->linear == QKV && s->layer) add_low(s, s->layer - 1, DOWN, span.first, span.count, span.key);
    if (s->linear > OUT) add_low(s, s->layer, s->linear - 1, span.first, span.count, span.key);
    for (int row = span.first; row < span.first + span.count; row++)
        quantise(&s->quantised, row, (Place){0, 0}, input_of(s, row, scratch), in);
    if (!m->adapters[span.key]) return;
    const LoraLinear *lora = m->adapters[span.key] + s->layer * LINEARS + s->linear;
    for (int tile = 0; tile < tiles_of(lora->width); tile++)
        multiply(lora->a, lora->width, in, tile, &s->quantised, span.first, span.count, (Place){0, 0},
                 s->low + (size_t)span.first * s->low_stride + tile * tile_of(lora->width), s->low_stride, 0, NULL);
    for (int row = span.first; row < span.first + span.count; row++)
        for (int p = 0; p < PARTS; p++)
            if (lora->ranks[p])
                quantise(&s->low_quantised, row, lora->places[p],
                         s->low + (size_t)row * s->low_stride + lora->places[p].value, lora->ranks[p]);
}

/* One tile of outputs of a linear for all rows. */
static void write_tile(Step *s, int tile, int thread) {
    const Linear *linear = &s->model->layer[s->layer].linears[s->linear];
    const Target target = target_of(s, s->linear);
    (void)thread;
    int part = 0, at = 0; /* the first output of the part, then of the tile */
    while (tile >= tiles_of(linear->outs[part])) {
        tile -= tiles_of(linear->outs[part]);
        at += stored(linear->outs[part++]);
    }
    const int out = linear->outs[part];
    at += tile * tile_of(out);
    multiply(linear->weights[part], out, linear->in, tile, &s->quantised, 0, s->count, (Place){0, 0}, target.y + at,
             target.stride, target.add, linear->bias ? linear->bias + at : NULL);
}

static void rotate(float *head, const float *cosines, const float *sines, int half) {
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

/* Where the keys [d][PAGE] of a page begin for one head; the values [PAGE][d in whole vectors] follow them. */
INLINE uint16_t *page_of(const Step *s, int sequence, int page, int head) {
    const Model *m = s->model;
    const size_t number = s->pages[(size_t)sequence * s->most_pages + page];
    const size_t size = (size_t)PAGE * (m->head_dim + ROUND(m->head_dim, 16));
    return m->cache + (((size_t)s->layer * m->pages + number) * m->kv_heads + head) * size;
}

/* Turn the heads of one token by its position, and keep its key and value. */
static void keep_token(Step *s, int row, int thread) {
    const Model *m = s->model;
    const int d = m->head_dim, half = d / 2, position = s->positions[row], place = position % PAGE;
    const float *cosines = m->cosines + (size_t)position * half, *sines = m->sines + (size_t)position * half;
    float *q = s->qkv + (size_t)row * s->qkv_stride, *k = q + stored(m->heads * d);
    const float *v = k + stored(m->kv_heads * d);
    const float *const *norms = m->layer[s->layer].head_norms;
    (void)thread;
    add_low(s, s->layer, QKV, row, 1, s->slots[s->sequence[row]]);
    for (int h = 0; h < m->heads + m->kv_heads; h++) {
        float *head = h < m->heads ? q + h * d : k + (h - m->heads) * d;
        if (norms[0]) rms_norm(head, head, norms[h >= m->heads], d, m->eps);
        rotate(head, cosines, sines, half);
    }
    for (int h = 0; h < m->kv_heads; h++) {
        uint16_t *keys = page_of(s, s->sequence[row], position / PAGE, h), *values = keys + PAGE * d;
        for (int i = 0; i < d; i++) keys[i * PAGE + place] = to_bf16(k[h * d + i]);
        for (int i = 0; i < d; i++) values[place * ROUND(d, 16) + i] = to_bf16(v[h * d + i]);
    }
}

/* Scores of one query for `pages` pages of keys, each [d][PAGE]. In two sums: one would wait for itself. */
INLINE void score(floats *to, const float *keys, const float *query, int d, const int pages) {
    floats even[BLOCK], odd[BLOCK];
    for (int p = 0; p < pages; p++) even[p] = odd[p] = (floats){0};
    for (int j = 0; j < d; j += 2)
        for (int p = 0; p < pages; p++) {
            even[p] += *(const floats *)(keys + (p * d + j) * PAGE) * query[j];
            odd[p] += *(const floats *)(keys + (p * d + j + 1) * PAGE) * query[j + 1];
        }
    for (int p = 0; p < pages; p++) to[p] = even[p] + odd[p];
}

/* out[0 .. vectors * 16) += the weighted values, rows of `wide`; weights beyond `places` are zero. */
INLINE void weigh(float *out, const float *values, const float *weights, int places, int wide, const int vectors) {
    floats even[4], odd[4];
    for (int v = 0; v < vectors; v++) even[v] = *(floats *)(out + 16 * v), odd[v] = (floats){0};
    for (int place = 0; place < places; place += 2)
        for (int v = 0; v < vectors; v++) {
            even[v] += *(const floats *)(values + place * wide + 16 * v) * weights[place];
            odd[v] += *(const floats *)(values + (place + 1) * wide + 16 * v) * weights[place + 1];
        }
    for (int v = 0; v < vectors; v++) *(floats *)(out + 16 * v) = even[v] + odd[v];
}

typedef struct {
    float best;
    floats sum;
} Softmax;

/* Take `pages` pages into the softmax of one query that sees `places` of their places. */
static void take_pages(Softmax *soft, float *out, const float *query, const float *keys, const float *values, int pages,
                       int places, int d, int wide) {
    floats scores[BLOCK], most = splat(soft->best);
    switch (pages) {
    case 1: score(scores, keys, query, d, 1); break;
    case 2: score(scores, keys, query, d, 2); break;
    case 3: score(scores, keys, query, d, 3); break;
    default: score(scores, keys, query, d, BLOCK);
    }
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int p = 0; p < pages; p++) {
        scores[p] = choose(lanes < places - p * PAGE, scores[p], splat(-1e30f));
        most = choose(scores[p] > most, scores[p], most);
    }
    const float best = max16(most);
    if (best > soft->best) {
        const floats shrink = exp16(splat(soft->best - best));
        soft->best = best;
        soft->sum *= shrink;
        for (int j = 0; j < wide; j += 16) *(floats *)(out + j) *= shrink;
    }
    float weights[BLOCK * PAGE];
    for (int p = 0; p < pages; p++) {
        const floats weight = choose(lanes < places - p * PAGE, exp16(scores[p] - best), (floats){0});
        soft->sum += weight;
        *(floats *)(weights + p * PAGE) = weight;
    }
    int j = 0;
    for (; j + 64 <= wide; j += 64) weigh(out + j, values + j, weights, places, wide, 4);
    for (; j < wide; j += 16) weigh(out + j, values + j, weights, places, wide, 1);
}

/* The keys of a page, scaled, and its values as floats; `later` is the page that will be read a block later. */
INLINE void read_page(float *keys, float *values, const uint16_t *page, const uint16_t *later, int d, int wide, float scale) {
    for (int i = 0; i < PAGE * d; i += 16) {
        __builtin_prefetch(later + i);
        *(floats *)(keys + i) = from_bf16(page + i) * scale;
    }
    page += PAGE * d, later += PAGE * d;
    for (int i = 0; i < PAGE * wide; i += 16) {
        __builtin_prefetch(later + i);
        *(floats *)(values + i) = from_bf16(page + i);
    }
}

INLINE int last_page(const Step *s, Span span) { return s->positions[span.first + span.count - 1] / PAGE; }

/* The pages that an item begins with; of the last item, where there is no such item. */
INLINE const uint16_t *first_pages(const Step *s, int item, int page) {
    const int heads = s->model->kv_heads, items = s->queries_count * heads;
    if (item >= items) item = items - 1;
    const Span span = s->queries[item / heads];
    const int last = last_page(s, span);
    return page_of(s, span.key, page < last ? page : last, item % heads);
}

/* Attention of some tokens of one sequence under one key head, a few pages at a time with a running softmax (Milakov &
 * Gimelshein, 2018): a query keeps its best score, its sum and its output, which shrink when a better score comes. */
static void attend(Step *s, int item, int thread) {
    const Model *m = s->model;
    const Span span = s->queries[item / m->kv_heads];
    const int head = item % m->kv_heads, d = m->head_dim, wide = ROUND(d, 16), share = m->heads / m->kv_heads;
    const int last = last_page(s, span), queries = span.count * share;
    const int next = item + m->pool->count + 1; /* what this thread is likely to take next */
    const float scale = 1 / sqrtf(d);
    float *keys = s->scratch + thread * s->scratch_floats, *values = keys + BLOCK * PAGE * d;
    float *outs = values + BLOCK * PAGE * wide;
    Softmax *soft = (Softmax *)(outs + queries * wide);
    memset(outs, 0, sizeof(float) * queries * wide);
    for (int i = 0; i < queries; i++) soft[i] = (Softmax){-1e30f, {0}};
    for (int page = 0; page <= last; page += BLOCK) {
        const int pages = last - page + 1 < BLOCK ? last - page + 1 : BLOCK;
        for (int p = 0; p < pages; p++)
            read_page(keys + p * PAGE * d, values + p * PAGE * wide, page_of(s, span.key, page + p, head),
                      page + p + BLOCK <= last ? page_of(s, span.key, page + p + BLOCK, head) : first_pages(s, next, p), d, wide,
                      scale);
        for (int i = 0; i < queries; i++) {
            const int row = span.first + i / share, seen = s->positions[row] + 1 - page * PAGE, most = pages * PAGE;
            if (seen <= 0) continue;
            const int places = seen < most ? seen : most;
            take_pages(soft + i, outs + i * wide, s->qkv + (size_t)row * s->qkv_stride + (head * share + i % share) * d, keys,
                       values, (places + PAGE - 1) / PAGE, places, d, wide);
        }
    }
    for (int i = 0; i < queries; i++) {
        const float inverse = 1 / sum16(soft[i].sum);
        float *to = s->attended + (size_t)(span.first + i / share) * s->attended_stride + (head * share + i % share) * d;
        for (int j = 0; j < d; j++) to[j] = outs[i * wide + j] * inverse;
    }
}

static void embed(Step *s, int row, int thread) {
    const int n = s->model->hidden;
    const uint16_t *from = s->model->embeddings + (size_t)s->tokens[row] * n;
    float *to = s->x + (size_t)row * s->hidden_stride;
    (void)thread;
    for (int i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

static void read_wanted(Step *s, int item, int thread) {
    const int row = s->wanted[item];
    add_low(s, s->model->layers - 1, DOWN, row, 1, s->slots[s->sequence[row]]);
    const float *x = input_of(s, row, s->scratch + thread * s->scratch_floats);
    quantise(&s->quantised, item, (Place){0, 0}, x, s->model->hidden);
}

static void write_logits(Step *s, int tile, int thread) {
    const Linear *head = &s->model->head;
    const int out = head->outs[0];
    (void)thread;
    multiply(head->weights[0], out, head->in, tile, &s->quantised, 0, s->wanted_count, (Place){0, 0},
             s->logits + tile * tile_of(out), stored(out), 0, NULL);
}

static void apply(Step *s, int linear) {
    Pool *pool = s->model->pool;
    s->linear = linear;
    parallel(pool, read_rows, s->spans_count);
    parallel(pool, write_tile, tiles(&s->model->layer[s->layer].linears[linear]));
}

/* Cut the tokens into spans of at most `most` with equal keys. */
static int cut(Span *spans, const int32_t *sequence, const int32_t *slots, int count, int most) {
    int n = 0;
    for (int row = 0; row < count; row++) {
        const int key = slots ? slots[sequence[row]] : sequence[row];
        if (n && spans[n - 1].key == key && spans[n - 1].count < most) spans[n - 1].count++;
        else spans[n++] = (Span){row, 1, key};
    }
    return n;
}

static void *aligned(size_t size) {
    void *memory = aligned_alloc(64, ROUND(size, 64));
    if (memory) memset(memory, 0, ROUND(size, 64));
    return memory;
}

static int quantised_new(Quantised *q, int rows, int width) {
    q->stride = width;
    q->groups = (width + GROUP - 1) / GROUP;
    q->values = aligned((size_t)rows * q->stride);
    q->scales = aligned(sizeof(float) * rows * q->groups);
    q->corrections = aligned(sizeof(int32_t) * rows * q->groups);
    return q->values && q->scales && q->corrections;
}

void step_free(Step *s) {
    if (!s) return;
    void *parts[] = {s->x, s->qkv, s->attended, s->gate_up, s->low, s->spans, s->queries, s->scratch, s->quantised.values,
                     s->quantised.scales, s->quantised.corrections, s->low_quantised.values, s->low_quantised.scales,
                     s->low_quantised.corrections, s};
    for (size_t i = 0; i < sizeof(parts) / sizeof(*parts); i++) free(parts[i]);
}

/* The workspace of passes of up to `most_tokens` tokens; NULL where memory is short. */
Step *step_new(const Model *m) {
    Step *s = aligned(sizeof(Step));
    if (!s) return NULL;
    const Linear *linears = m->layer[0].linears;
    const int rows = m->most_tokens, wide = ROUND(m->head_dim, 16), share = m->heads / m->kv_heads;
    int widest = padded(m->hidden) > padded(m->intermediate) ? padded(m->hidden) : padded(m->intermediate);
    if (padded(m->heads * m->head_dim) > widest) widest = padded(m->heads * m->head_dim);
    s->model = m;
    s->qkv_stride = outputs(&linears[QKV]);
    s->hidden_stride = stored(m->hidden);
    s->attended_stride = ROUND(m->heads * m->head_dim, 16);
    s->gate_stride = outputs(&linears[GATE_UP]);
    s->low_stride = PARTS * MAX_RANK;
    s->scratch_floats = BLOCK * PAGE * (m->head_dim + wide) + QUERIES * share * (wide + sizeof(Softmax) / sizeof(float));
    if (s->scratch_floats < (size_t)ROUND(widest, 64)) s->scratch_floats = ROUND(widest, 64);
    s->x = aligned(sizeof(float) * rows * s->hidden_stride);
    s->qkv = aligned(sizeof(float) * rows * s->qkv_stride);
    s->attended = aligned(sizeof(float) * rows * s->attended_stride);
    s->gate_up = aligned(sizeof(float) * rows * s->gate_stride);
    s->low = aligned(sizeof(float) * rows * s->low_stride);
    s->spans = aligned(sizeof(Span) * rows);
    s->queries = aligned(sizeof(Span) * rows);
    s->scratch_floats = ROUND(s->scratch_floats, 16);
    s->scratch = aligned(sizeof(float) * s->scratch_floats * (m->pool->count + 1));
    const int quantised = quantised_new(&s->quantised, rows, widest) && quantised_new(&s->low_quantised, rows, s->low_stride);
    if (quantised && s->x && s->qkv && s->attended && s->gate_up && s->low && s->spans && s->queries && s->scratch) return s;
    step_free(s);
    return NULL;
}

INLINE int within(int32_t number, int end) { return (uint32_t)number < (uint32_t)end; }

/* Whether all numbers of the batch are of something that there is. */
static int fits(const Step *s, int sequences) {
    const Model *m = s->model;
    int fit = s->count <= m->most_tokens && s->wanted_count <= m->most_tokens;
    for (int i = 0; i < s->count; i++)
        fit &= within(s->tokens[i], m->vocab) && within(s->positions[i], m->context) && within(s->sequence[i], sequences) &&
               s->positions[i] / PAGE < s->most_pages;
    for (int i = 0; i < s->wanted_count; i++) fit &= within(s->wanted[i], s->count);
    for (int i = 0; i < sequences; i++) fit &= within(s->slots[i], m->slots + 1);
    for (size_t i = 0; i < (size_t)sequences * s->most_pages; i++) fit &= within(s->pages[i], m->pages);
    return fit;
}

/* Logits [wanted][vocab in whole tiles] of a batch (see batch.py). Returns 0 where it does not fit the model. */
int step_forward(Step *s, const int32_t *tokens, const int32_t *positions, const int32_t *sequence, int count,
                 const int32_t *pages, int sequences, int most_pages, const int32_t *slots, const int32_t *wanted,
                 int wanted_count, float *logits) {
    const Model *m = s->model;
    Pool *pool = m->pool;
    const int threads = pool->count + 1, even = (count + 2 * threads - 1) / (2 * threads);
    s->tokens = tokens, s->positions = positions, s->sequence = sequence, s->pages = pages, s->slots = slots;
    s->wanted = wanted, s->count = count, s->most_pages = most_pages, s->wanted_count = wanted_count, s->logits = logits;
    if (!fits(s, sequences)) return 0;
    s->spans_count = cut(s->spans, sequence, slots, count, even < ROWS ? even : ROWS);
    s->queries_count = cut(s->queries, sequence, NULL, count, QUERIES);
    pool->step = s;
    if (pool->count) set_awake(pool, 1);
    s->layer = 0;
    parallel(pool, embed, count);
    for (; s->layer < m->layers; s->layer++) {
        apply(s, QKV);
        parallel(pool, keep_token, count);
        parallel(pool, attend, s->queries_count * m->kv_heads);
        apply(s, OUT);
        apply(s, GATE_UP);
        apply(s, DOWN);
    }
    s->linear = QKV; /* the last norm, in place of a layer's first */
    parallel(pool, read_wanted, wanted_count);
    parallel(pool, write_logits, tiles(&m->head));
    if (pool->count) set_awake(pool, 0);
    return 1;
}

/* ---- adapters ---- */

/* Lay out an adapter at `to` (NULL: only count) from its matrices [layers][MODULES], NULL where it has none; a: [rank][in],
 * b: [out][rank]. Returns the bytes that it takes, or 0 where a number is not finite. */
size_t lora_pack(const Model *m, uint8_t *to, LoraLinear *lora, const float *const *a, const float *const *b,
                 const int32_t *ranks) {
    const float *rows[PARTS * MAX_RANK];
    size_t used = 0;
    int finite = 1;
    for (int layer = 0; layer < m->layers; layer++)
        for (int l = 0, module = layer * MODULES; l < LINEARS; module += m->layer[layer].linears[l].parts, l++) {
            const Linear *linear = &m->layer[layer].linears[l];
            LoraLinear *here = lora + layer * LINEARS + l;
            Place place = {0, 0};
            memset(here, 0, sizeof(*here));
            memset(rows, 0, sizeof(rows));
            for (int p = 0; p < linear->parts; p++) {
                const int rank = here->ranks[p] = ranks[module + p];
                here->places[p] = place;
                for (int r = 0; r < rank; r++) rows[place.value + r] = a[module + p] + (size_t)r * linear->in;
                place.value += padded(rank), place.group += groups_of(rank);
            }
            here->width = place.value;
            here->a = to ? to + used : NULL;
            const int tile = tile_of(here->width);
            for (int first = 0; first < here->width; first += tile, used += tile_bytes(here->width, linear->in))
                if (to) finite &= pack_tile(to + used, tile, rows + first, here->width - first, linear->in);
            for (int p = 0; p < linear->parts; p++) {
                if (!here->ranks[p]) continue;
                here->b[p] = to ? to + used : NULL;
                if (to) finite &= matrix_pack(to + used, b[module + p], linear->outs[p], here->ranks[p]);
                used += matrix_bytes(linear->outs[p], here->ranks[p]);
            }
        }
    return finite ? used : 0;
}

/* ---- the pool ---- */

Pool *pool_new(int threads) {
    Pool *pool = aligned(sizeof(Pool));
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = calloc((size_t)threads, sizeof(pthread_t));
    for (int i = 1; pool->threads && i < threads; i++) {
        Worker *me = malloc(sizeof(Worker));
        if (!me) break;
        *me = (Worker){pool, i};
        if (pthread_create(&pool->threads[pool->count], NULL, worker, me)) {
            free(me); /* those that there are do the work */
            break;
        }
        pool->count++;
    }
    return pool;
}

void pool_free(Pool *pool) {
    if (!pool) return;
    set_awake(pool, -1);
    for (int i = 0; i < pool->count; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}
