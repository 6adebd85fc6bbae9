/* Plain C: any width, group size and 1 to 8 bits (included by kernels.c). The reference of the AVX2 kernels. */

#define RUN 256 /* products summed in one go; longer groups are cut, so that rounding errors do not grow with them */

/* Codes of one row, counted from 0, in order. */
INLINE void unpack_bits(const uint8_t *p, int64_t width, int bits, uint8_t *out) {
    const unsigned mask = (1u << bits) - 1;
    for (int64_t i = 0; i < width; i++) {
        int64_t at = i * bits;
        unsigned word = p[at >> 3];
        if (bits == 3 || bits > 4) word |= (unsigned)p[(at >> 3) + 1] << 8; /* only these straddle bytes */
        out[i] = (uint8_t)((word >> (at & 7)) & mask);
    }
}

static void unpack_row(const fb_layer *L, int64_t row, uint8_t *out) {
    const uint8_t *p = L->codes + row * L->stride;
    switch (L->bits) { /* the constant lets the compiler unroll */
    case 1: unpack_bits(p, L->width, 1, out); break;
    case 2: unpack_bits(p, L->width, 2, out); break;
    case 3: unpack_bits(p, L->width, 3, out); break;
    case 4: unpack_bits(p, L->width, 4, out); break;
    default: unpack_bits(p, L->width, L->bits, out);
    }
}

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

/* Working memory of one thread: scales, levels, codes of a row. Rows become NaN if there is none. */
static void portable_rows(const job *J, int64_t begin, int64_t end) {
    const fb_layer *L = J->L;
    float *scale = malloc((size_t)L->num_groups * 4 + (size_t)L->width * 5);
    float *levels = scale + L->num_groups;
    int16_t *twice = (int16_t *)levels; /* twice the level over the step; never both */
    uint8_t *u = (uint8_t *)(levels + L->width);
    for (int64_t row = begin; row < end; row++) {
        if (scale) {
            row_scales(L, row, 1, scale);
            unpack_row(L, row, u);
            if (!J->int8)
                for (int64_t i = 0; i < L->width; i++) levels[i] = L->levels[u[i]];
            else
                for (int64_t i = 0; i < L->width; i++) twice[i] = (int16_t)(2 * u[i] - L->twice_zero);
        }
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

static void portable_dequantize(const fb_layer *L, int64_t row, float *out) {
    uint8_t *u = malloc((size_t)L->width + (size_t)L->num_groups * 4 + 8);
    float *scale = (float *)((uintptr_t)(u + L->width + 3) & ~(uintptr_t)3);
    if (u) {
        row_scales(L, row, 1, scale);
        unpack_row(L, row, u);
    }
    for (int64_t k = 0, g = 0; k < L->width; k += L->group, g++) {
        int64_t end = k + L->group < L->width ? k + L->group : L->width;
        for (int64_t i = k; i < end; i++) out[i] = u ? scale[g] * L->levels[u[i]] : NOT_A_NUMBER;
    }
    free(u);
}
