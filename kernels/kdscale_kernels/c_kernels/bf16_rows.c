/* The steps on rows of bf16 logits (row_steps.Bf16Steps), each in one or two passes over a row that is in cache.

   Legend: C rows, V columns, K entries of a row, H hidden size, M candidates, T temperature.

   Plain C for the compiler to vectorise: library.py has the flags. Each row is summed by one thread in one order, so
   that the same call gives the same bits, whatever the number of threads. A NaN among the logits makes the sums of its
   row NaN, and no comparison may hide it. Sums are fp32. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP = 32 }; /* columns of which the search for candidates keeps the largest; 8 to 128 were measured */

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* To the nearest bf16, ties to even. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* exp(x) for x <= 0, within 4e-7 of itself: 2^n · exp(r) with |r| <= ln(2) / 2, and zero below -87. NaN stays NaN. */
static inline float exp_below_zero(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: the sum's low bits are n */
    float n = shifted - 12582912.0f;
    float r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
    float series = 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : series * power;
}

/* exp((z - shift) / T), summed; written as bf16 to out unless that is null (out may be z). */
static float sum_exponentials(const uint16_t *z, long columns, float shift, float per_temperature, uint16_t *out) {
    float sum = 0.0f;
    if (out) {
#pragma omp simd reduction(+ : sum)
        for (long v = 0; v < columns; v++) {
            float e = exp_below_zero((widen(z[v]) - shift) * per_temperature);
            sum += e;
            out[v] = narrow(e);
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (long v = 0; v < columns; v++) sum += exp_below_zero((widen(z[v]) - shift) * per_temperature);
    }
    return sum;
}

/* top [C], the sums [C] of exp(z - top) and of exp((z - top) / T); z becomes the latter, and plain the former unless it
   is null. A row of nothing but -inf has sums of 0. */
void exponentials(uint16_t *z, uint16_t *plain, long rows, long columns, float temperature, float *top, float *plain_sum,
                  float *tempered_sum, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < rows; c++) {
        uint16_t *row = z + c * columns;
        float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
        for (long v = 0; v < columns; v++) {
            float value = widen(row[v]);
            largest = value > largest ? value : largest;
        }
        float shift = largest == -INFINITY ? 0.0f : largest;
        if (temperature != 1.0f)
            plain_sum[c] = sum_exponentials(row, columns, shift, 1.0f, plain ? plain + c * columns : NULL);
        tempered_sum[c] = sum_exponentials(row, columns, shift, 1.0f / temperature, row);
        if (temperature == 1.0f) plain_sum[c] = tempered_sum[c];
        top[c] = tempered_sum[c] != tempered_sum[c] ? NAN : largest;
    }
}

/* first ← first · first_factor + second · second_factor, a factor a row; second may be null. */
void scale(uint16_t *first, const uint16_t *second, long rows, long columns, const float *first_factor,
           const float *second_factor, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < rows; c++) {
        uint16_t *row = first + c * columns;
        float factor = first_factor[c];
        if (second) {
            const uint16_t *other = second + c * columns;
            float other_factor = second_factor[c];
#pragma omp simd
            for (long v = 0; v < columns; v++) row[v] = narrow(widen(row[v]) * factor + widen(other[v]) * other_factor);
        } else {
#pragma omp simd
            for (long v = 0; v < columns; v++) row[v] = narrow(widen(row[v]) * factor);
        }
    }
}

/* out [C,K] = hidden [C,H] · weight[ids] [C,K,H]. */
void dots(const uint16_t *hidden, const uint16_t *weight, const int64_t *ids, long rows, long entries, long width,
          float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long c = 0; c < rows; c++) {
        const uint16_t *x = hidden + c * width;
        const int64_t *id = ids + c * entries;
        for (long k = 0; k < entries; k++) {
            const uint16_t *w = weight + id[k] * width;
            if (k + 2 < entries) { /* the head's rows lie anywhere in memory: ask for one while two are summed */
                const char *next = (const char *)(weight + id[k + 2] * width);
                for (long byte = 0; byte < 2 * width; byte += 64) __builtin_prefetch(next + byte);
            }
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long h = 0; h < width; h++) sum += widen(x[h]) * widen(w[h]);
            out[c * entries + k] = sum;
        }
    }
}

/* A bf16 value as an integer in the order of the values; -0 lies below 0. */
static inline int16_t order_of(uint16_t bits) {
    int16_t key = (int16_t)bits;
    return key ^ (int16_t)((key >> 15) & 0x7fff);
}

/* The count-th largest of some keys, by a search over its bits from the top. */
static int16_t nth_largest(const int16_t *keys, long length, long count) {
    int32_t found = -32768;
    for (int32_t bit = 32768; bit; bit >>= 1) {
        int16_t tried = (int16_t)(found + bit);
        long above = 0;
        for (long j = 0; j < length; j++) above += keys[j] >= tried;
        if (above >= count) found = tried;
    }
    return (int16_t)found;
}

/* What `candidates` needs of memory for one thread. */
typedef struct {
    int16_t *maxima, *found;
    int32_t *column;
} Scratch;

/* The `count` largest of a row in any order, the last of them the lowest. The `count` groups with the largest maxima
   hold as many values that are no smaller than the least of these maxima, so the others are not read again. A group's
   columns lie V / GROUP apart, and what is left over is searched as well. */
static void row_candidates(const uint16_t *z, long columns, long count, int64_t *ids, Scratch s) {
    long groups = columns / GROUP, found = 0, taken = 0;
    for (long g = 0; g < groups; g++) s.maxima[g] = order_of(z[g]);
    for (long e = 1; e < GROUP; e++) {
        const uint16_t *part = z + e * groups;
        for (long g = 0; g < groups; g++) {
            int16_t key = order_of(part[g]);
            s.maxima[g] = key > s.maxima[g] ? key : s.maxima[g];
        }
    }
    int16_t bound = nth_largest(s.maxima, groups, count);
    for (long g = 0; g < groups; g++) {
        if (s.maxima[g] < bound) continue;
        for (long v = g; v < groups * GROUP; v += groups)
            if (order_of(z[v]) >= bound) s.found[found] = order_of(z[v]), s.column[found++] = (int32_t)v;
    }
    for (long v = groups * GROUP; v < columns; v++)
        if (order_of(z[v]) >= bound) s.found[found] = order_of(z[v]), s.column[found++] = (int32_t)v;
    bound = nth_largest(s.found, found, count);
    for (long j = 0; j < found; j++)
        if (s.found[j] > bound) ids[taken++] = s.column[j];
    for (long j = 0; j < found && taken < count; j++)
        if (s.found[j] == bound) ids[taken++] = s.column[j];
}

/* ids [C,M] of each row's M largest, the last of them the lowest; lowest [C], its value; others [C], the sum of
   exp((z - lowest) / T) over the row without the M - 1 before it, which become -inf. 0, or 1 where memory is short.
   With fewer than M groups of columns all of a row is searched. */
int candidates(uint16_t *z, long rows, long columns, long count, float temperature, int64_t *ids, float *lowest,
               float *others, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Scratch s = {malloc(columns / GROUP * 2), malloc(columns * 2), malloc(columns * 4)};
        failed = !s.maxima || !s.found || !s.column;
#pragma omp for schedule(static)
        for (long c = 0; c < rows; c++) {
            if (failed) continue;
            uint16_t *row = z + c * columns;
            int64_t *id = ids + c * count;
            row_candidates(row, columns, count, id, s);
            lowest[c] = widen(row[id[count - 1]]);
            for (long m = 0; m < count - 1; m++) row[id[m]] = 0xff80;
            others[c] = sum_exponentials(row, columns, lowest[c], 1.0f / temperature, NULL);
        }
        free(s.maxima), free(s.found), free(s.column);
    }
    return failed;
}
