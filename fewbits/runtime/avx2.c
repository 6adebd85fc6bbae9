/* AVX2 + FMA: 8 lanes (included by kernels.c; the kernels themselves are in lanes.c). */

#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) avx2_##x
#define V 8
#define VF __m256
#define VI __m256i
#define ZERO_F _mm256_setzero_ps()
#define LOAD_F(p) _mm256_load_ps(p)
#define STORE_F(p, x) _mm256_storeu_ps(p, x)
#define MUL_F(a, b) _mm256_mul_ps(a, b)
#define FMA_F(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOAD_I(p) _mm256_load_si256((const __m256i *)(p))
#define SUB_I32(a, b) _mm256_sub_epi32(a, b)
#define TO_FLOAT(x) _mm256_cvtepi32_ps(x)

#define LEAF static inline __attribute__((always_inline, target("avx2,fma")))

/* 8 dwords of 4 bytes (3 bits: of 3 bytes). */
LEAF VI avx2_load(const uint8_t *p, int bits) {
    if (bits != 3) return _mm256_loadu_si256((const __m256i *)p);
    const VI spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, /* high half: p + 12 */
                                       0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    VI both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    both = _mm256_inserti128_si256(both, _mm_loadu_si128((const __m128i *)(p + 12)), 1);
    return _mm256_shuffle_epi8(both, spread);
}

LEAF VF avx2_table(const float *levels, int bits) {
    return bits <= 2 ? _mm256_broadcast_ps((const __m128 *)levels) : _mm256_loadu_ps(levels);
}

/* Levels of the codes in the low bits of v >> shift: vpermilps (4 levels) and vpermps (8) ignore the higher bits. */
LEAF VF avx2_levels(VI v, int bits, int shift, VF low, VF high) {
    VI index = shift ? _mm256_srli_epi32(v, shift) : v;
    if (bits <= 2) return _mm256_permutevar_ps(low, index);
    VF level = _mm256_permutevar8x32_ps(low, index);
    if (bits == 3) return level;
    VF top = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28 - shift)); /* bit 3 of the code becomes the sign */
    return _mm256_blendv_ps(level, _mm256_permutevar8x32_ps(high, index), top);
}

/* Step t of the bytes of a block, one code each. */
LEAF VI avx2_bytes(VI v, int bits, int t) {
    if (bits == 3) { /* 4 codes in bits 0..11 of each dword to 4 bytes, in two halvings */
        v = t ? _mm256_srli_epi32(v, 12) : _mm256_and_si256(v, _mm256_set1_epi32(0xfff));
        v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 10)), _mm256_set1_epi32(0x003f003f));
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 5)), _mm256_set1_epi32(0x07070707));
    }
    v = t ? _mm256_srli_epi16(v, t * bits) : v;
    return _mm256_and_si256(v, _mm256_set1_epi8((char)((1 << bits) - 1)));
}

/* sum + codes times q: 16-bit pairs, at most 15 * 127 * 2 a step, so that all steps of a block fit. */
LEAF VI avx2_dot(VI sum, VI codes, VI q, int t) {
    VI pair = _mm256_maddubs_epi16(codes, q);
    return t ? _mm256_add_epi16(sum, pair) : pair;
}

LEAF VI avx2_twice(VI sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(2)); }

/* The lanes' scales: `scale` points at the first group of the block. */
LEAF VF avx2_scales(const float *scale, const int32_t *lane) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scale), _mm256_loadu_si256((const __m256i *)lane));
}

LEAF float avx2_total(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#include "lanes.c"

#undef LEAF
#undef TARGET
#undef NAME
#undef V
#undef VF
#undef VI
#undef ZERO_F
#undef LOAD_F
#undef STORE_F
#undef MUL_F
#undef FMA_F
#undef LOAD_I
#undef SUB_I32
#undef TO_FLOAT
