/* Plain C: any width, group size and 1 to 8 bits (included by kernels.c). The reference of the AVX2 kernels. */

#define RUN 256 /* products summed in one go; longer groups are cut, so that rounding errors do not grow with them */

/* Codes of one row, counted from 0, in order. */
static void unpack_row(const fb_layer *L, int64_t row, uint8_t *out) {
    const uint8_t *p = L->codes + row * L->stride;
    const unsigned mask = (1u << L->bits) - 1;
    for (int64_t i = 0, at = 0; i < L->width; i++, at += L->bits) {
        unsigned word = p[at >> 3] | (unsigned)p[(at >> 3) + 1] << 8; /* 64 bytes behind the codes may be read */
        out[i] = (uint8_t)((word >> (at & 7)) & mask);
    }
}

/* What the codes of one byte (bits 1, 2, 4, 8) or of 6 bits (bits 3) stand for: one look-up decodes several weights. */
typedef struct {
    int per;           /* codes in an entry, 0 if the width of the code allows no table */
    float levels[2048]; /* (entries, per) */
    int16_t twice[2048]; /* (entries, per): twice the level over the step */
} decoder;

static void make_decoder(const fb_layer *L, decoder *D) {
    const int bits = L->bits, wide = bits == 3 ? 6 : 8;
    D->per = wide % bits ? 0 : wide / bits;
    for (int entry = 0; entry < 1 << wide; entry++)
        for (int i = 0; i < D->per; i++) {
            int code = entry >> (i * bits) & ((1 << bits) - 1);
            D->levels[entry * D->per + i] = L->levels[code];
            D->twice[entry * D->per + i] = (int16_t)(2 * code - L->twice_zero);
        }
}

/* `out` has room for 7 codes more than the row has. */
#define DECODE(name, type, table)                                                                                      \
    INLINE void name##_bits(const decoder *D, const uint8_t *p, int64_t width, int bits, type *out) {                  \
        const int per = bits == 3 ? 2 : 8 / bits;                                                                      \
        if (bits != 3)                                                                                                 \
            for (int64_t i = 0; i < width; i += per, p++) memcpy(out + i, D->table + *p * per, sizeof(type) * per);    \
        else                                                                                                           \
            for (int64_t i = 0; i < width; i += 8, p += 3) {                                                           \
                uint32_t word = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16;                                     \
                for (int k = 0; k < 4; k++)                                                                            \
                    memcpy(out + i + 2 * k, D->table + (word >> (6 * k) & 63) * 2, 2 * sizeof(type));                  \
            }                                                                                                          \
    }                                                                                                                  \
    static void name(const fb_layer *L, const decoder *D, int64_t row, uint8_t *u, type *out) {                        \
        const uint8_t *p = L->codes + row * L->stride;                                                                 \
        switch (D->per ? L->bits : 0) { /* the constant lets the compiler unroll */                                    \
        case 1: name##_bits(D, p, L->width, 1, out); break;                                                            \
        case 2: name##_bits(D, p, L->width, 2, out); break;                                                            \
        case 3: name##_bits(D, p, L->width, 3, out); break;                                                            \
        case 4: name##_bits(D, p, L->width, 4, out); break;                                                            \
        default:                                                                                                       \
            unpack_row(L, row, u);                                                                                     \
            for (int64_t i = 0; i < L->width; i++) out[i] = name##_code(L, u[i]);                                      \
        }                                                                                                              \
    }

INLINE float decode_f32_code(const fb_layer *L, uint8_t code) { return L->levels[code]; }
INLINE int16_t decode_twice_code(const fb_layer *L, uint8_t code) { return (int16_t)(2 * code - L->twice_zero); }
DECODE(decode_f32, float, levels)
DECODE(decode_twice, int16_t, twice)

INLINE float dot_f32(const float *w, const float *x, int64_t n) {
    float part[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) part[j] += w[i + j] * x[i + j];
    for (; i < n; i++) part[i & 7] += w[i] * x[i];
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

INLINE int32_t dot_int8(const int16_t *twice, const int8_t *q, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int32_t)twice[i] * (int32_t)(int16_t)q[i]; /* pmaddwd */
    return sum;
}

static float row_f32(const fb_layer *L, const float *levels, const float *scale, const float *x) {
    float total = 0;
    for (int64_t k = 0, g = 0; k < L->width; k += L->group, g++) {
        int64_t end = k + L->group < L->width ? k + L->group : L->width;
        for (int64_t i = k; i < end; i += RUN)
            total += scale[g] * dot_f32(levels + i, x + i, end - i < RUN ? end - i : RUN);
    }
    return total;
}

static float row_int8(const fb_layer *L, const int16_t *twice, const float *scale, const int8_t *q, const float *xscale) {
    float total = 0;
    for (int64_t k = 0, g = 0; k < L->width; k += L->group, g++) {
        int64_t n = k + L->group < L->width ? L->group : L->width - k;
        float s = L->half_step * scale[g] * xscale[g];
        total += s * (float)dot_int8(twice + k, q + k, n);
    }
    return total;
}

/* Rows become NaN if there is no memory to work with: seen, not hidden. */
static void portable_rows(const job *J, int64_t begin, int64_t end) {
    const fb_layer *L = J->L;
    float *scale = malloc(sizeof(decoder) + (size_t)L->num_groups * 4 + (size_t)L->width * 5 + 32);
    float *levels = scale + L->num_groups;
    decoder *D = (decoder *)(levels + L->width + 7);
    int16_t *twice = (int16_t *)levels; /* never both */
    uint8_t *u = (uint8_t *)(D + 1);
    if (scale) make_decoder(L, D);
    for (int64_t row = begin; row < end; row++) {
        if (scale) row_scales(L, row, 1, scale);
        if (scale && J->int8) decode_twice(L, D, row, u, twice);
        if (scale && !J->int8) decode_f32(L, D, row, u, levels);
        for (int64_t i = 0; i < J->n; i++) {
            float sum = NOT_A_NUMBER;
            if (scale && J->int8)
                sum = row_int8(L, twice, scale, J->q + i * J->padded, J->xscale + i * L->num_groups);
            else if (scale)
                sum = row_f32(L, levels, scale, J->x + i * J->padded);
            J->y[i * L->rows + row] = sum;
        }
    }
    free(scale);
}

/* Row i of `out` (stride floats apart) is row ids[i], or start + i, of the weight. */
static void portable_dequantize(const fb_layer *L, const int64_t *ids, int64_t start, int64_t begin, int64_t end,
                                int64_t stride, float *out) {
    float *scale = malloc(sizeof(decoder) + (size_t)L->num_groups * 4 + (size_t)L->width * 5 + 32);
    float *levels = scale + L->num_groups;
    decoder *D = (decoder *)(levels + L->width + 7);
    if (scale) make_decoder(L, D);
    for (int64_t i = begin; i < end; i++) {
        float *to = out + i * stride;
        if (scale) {
            row_scales(L, ids ? ids[i] : start + i, 1, scale);
            decode_f32(L, D, ids ? ids[i] : start + i, (uint8_t *)(D + 1), levels);
        }
        for (int64_t k = 0, g = 0; k < L->width; k += L->group, g++) {
            int64_t stop = k + L->group < L->width ? k + L->group : L->width;
            for (int64_t j = k; j < stop; j++) to[j] = scale ? scale[g] * levels[j] : NOT_A_NUMBER;
        }
    }
    free(scale);
}
