/* The vector kernels, once per instruction set (included by avx2.c and avx512.c, which define V, VF, NAME(..) ..).
 *
 * Codes become levels in registers: a dword shifted right by whole codes is the index of a table look-up that ignores
 * the higher bits. One token or sixteen, one row or four: the order of the additions is the same, so that a result
 * does not depend on its batch.
 *
 * The last block of a row may run into the next row's codes. They meet activations that are zero, and every entry of
 * the level table is finite, so they add nothing. */

#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* ---- activations ------------------------------------------------------------------------------------------- */

/* Code t of lane j of a block goes to place V t + j; zeros beyond the width. */
LEAF void NAME(permute_bits)(const float *x, int64_t width, int bits, float *out) {
    const int lw = lane_width(bits);
    int64_t k = 0;
    for (; k + V * lw <= width; k += V * lw, out += V * lw)
        for (int t = 0; t < lw; t++)
            for (int j = 0; j < V; j++) out[V * t + j] = x[k + j * lw + t];
    for (int i = 0; k < width && i < V * lw; i++) {
        int64_t at = k + i % V * lw + i / V;
        out[i] = at < width ? x[at] : 0.0f;
    }
}

TARGET static void NAME(permute)(const float *x, int64_t width, int bits, float *out) {
    switch (bits) {
    case 1: NAME(permute_bits)(x, width, 1, out); break;
    case 2: NAME(permute_bits)(x, width, 2, out); break;
    default: NAME(permute_bits)(x, width, 4, out);
    }
}

/* Code i of a lane is byte `at` of step `step` in NAME(bytes). The lane's sum times twice_zero goes to `zero`. */
LEAF void NAME(permute_int8)(const int8_t *q, int64_t padded, int bits, int32_t twice_zero, int8_t *out, int32_t *zero) {
    const int lw = lane_width(bits), steps = lw / 4;
    for (int64_t k = 0; k < padded; k += V * lw, zero += V)
        for (int j = 0; j < V; j++) {
            int32_t sum = 0;
            for (int i = 0; i < lw; i++) {
                int step = bits == 3 ? i / 4 : i % steps, at = bits == 3 ? i % 4 : i / steps;
                out[k + 4 * V * step + 4 * j + at] = q[k + j * lw + i];
                sum += q[k + j * lw + i];
            }
            zero[j] = twice_zero * sum;
        }
}

TARGET static void NAME(prepare)(job *J, const float *x, int8_t *scratch) {
    const fb_layer *L = J->L;
    int64_t padded = J->padded, lanes = padded / lane_width(L->bits);
    for (int64_t n = 0; n < J->n; n++, x += L->width) {
        if (!J->int8) {
            NAME(permute)(x, L->width, L->bits, (float *)J->x + n * padded);
            continue;
        }
        int8_t *q = (int8_t *)J->q + n * padded;
        int32_t *zero = (int32_t *)J->zero + n * lanes;
        quantize_token(x, L->width, L->group, scratch, (float *)J->xscale + n * L->num_groups);
        memset(scratch + L->width, 0, (size_t)(padded - L->width));
        switch (L->bits) {
        case 1: NAME(permute_int8)(scratch, padded, 1, L->twice_zero, q, zero); break;
        case 2: NAME(permute_int8)(scratch, padded, 2, L->twice_zero, q, zero); break;
        case 3: NAME(permute_int8)(scratch, padded, 3, L->twice_zero, q, zero); break;
        default: NAME(permute_int8)(scratch, padded, 4, L->twice_zero, q, zero);
        }
    }
}

/* ---- R rows times N tokens ----------------------------------------------------------------------------------- */

LEAF void NAME(tile_f32)(const job *J, const int64_t *row, int64_t token, const float *scale, int64_t sstride, int bits,
                         int R, int N) {
    const fb_layer *L = J->L;
    const int lw = lane_width(bits), bytes = V * lw * bits / 8;
    const int64_t blocks = J->padded / (V * lw);
    const VF low = NAME(table)(L->levels, bits), high = NAME(table)(L->levels + 8, bits);
    VF total[4][4];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) total[r][n] = ZERO_F;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *p[4];
        const float *x = J->x + token * J->padded + b * V * lw;
        VF sum[4][4];
        VI v[4];
        UNROLL for (int r = 0; r < R; r++) {
            p[r] = L->codes + row[r] * L->stride + b * bytes;
            _mm_prefetch((const char *)(p[r] + R * L->stride), _MM_HINT_T0);
        }
        UNROLL for (int t = 0; t < lw; t++) {
            UNROLL for (int r = 0; r < R; r++) {
                if (t == 0) v[r] = NAME(load)(p[r], bits);
                VF level = NAME(levels)(v[r], bits, t * bits, low, high);
                UNROLL for (int n = 0; n < N; n++) {
                    VF xv = LOAD_F(x + n * J->padded + V * t);
                    sum[r][n] = t ? FMA_F(level, xv, sum[r][n]) : MUL_F(level, xv);
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            VF s = NAME(scales)(scale + r * sstride + L->first[b], L->lane + V * b);
            UNROLL for (int n = 0; n < N; n++) total[r][n] = FMA_F(sum[r][n], s, total[r][n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) J->y[(token + n) * L->rows + row[r]] = NAME(total)(total[r][n]);
}

/* `scale` holds, for each row and token, half_step * weight scale * activation scale of every group. */
LEAF void NAME(tile_int8)(const job *J, const int64_t *row, int64_t token, const float *scale, int64_t sstride, int bits,
                          int R, int N) {
    const fb_layer *L = J->L;
    const int lw = lane_width(bits), steps = lw / 4, bytes = V * lw * bits / 8;
    const int64_t blocks = J->padded / (V * lw);
    VF total[4][4];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) total[r][n] = ZERO_F;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *p[4];
        const int8_t *q = J->q + token * J->padded + b * V * lw;
        VI sum[4][4], v[4];
        UNROLL for (int r = 0; r < R; r++) {
            p[r] = L->codes + row[r] * L->stride + b * bytes;
            _mm_prefetch((const char *)(p[r] + R * L->stride), _MM_HINT_T0);
        }
        UNROLL for (int t = 0; t < steps; t++) {
            UNROLL for (int r = 0; r < R; r++) {
                if (t == 0) v[r] = NAME(load)(p[r], bits);
                VI codes = NAME(bytes)(v[r], bits, t);
                UNROLL for (int n = 0; n < N; n++)
                    sum[r][n] = NAME(dot)(sum[r][n], codes, LOAD_I(q + n * J->padded + 4 * V * t), t);
            }
        }
        UNROLL for (int n = 0; n < N; n++) {
            VI zero = LOAD_I(J->zero + ((token + n) * blocks + b) * V);
            UNROLL for (int r = 0; r < R; r++) {
                VF s = NAME(scales)(scale + (r * N + n) * sstride + L->first[b], L->lane + V * b);
                total[r][n] = FMA_F(TO_FLOAT(SUB_I32(NAME(twice)(sum[r][n]), zero)), s, total[r][n]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) J->y[(token + n) * L->rows + row[r]] = NAME(total)(total[r][n]);
}

/* Rows begin .. end, R at a time (a last, short tile repeats its last row), for N tokens from `token` on. */
LEAF void NAME(rows_of)(const job *J, int64_t begin, int64_t end, int64_t token, float *scale, int bits, int R, int N) {
    const fb_layer *L = J->L;
    const int64_t sstride = L->num_groups;
    float *scaled = scale + 4 * sstride + V;
    for (; begin < end; begin += R) {
        int64_t row[4];
        for (int r = 0; r < R; r++) {
            row[r] = begin + r < end ? begin + r : end - 1;
            if (begin + R > end) row_scales(L, row[r], 1, scale + r * sstride);
        }
        if (begin + R <= end) row_scales(L, begin, R, scale);
        if (!J->int8) {
            NAME(tile_f32)(J, row, token, scale, sstride, bits, R, N);
            continue;
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) {
                const float *xs = J->xscale + (token + n) * L->num_groups;
                for (int64_t g = 0; g < L->num_groups; g++)
                    scaled[(r * N + n) * sstride + g] = L->half_step * scale[r * sstride + g] * xs[g];
            }
        NAME(tile_int8)(J, row, token, scaled, sstride, bits, R, N);
    }
}

/* Two rows times four tokens, or four rows times one: the sums of a tile stay in registers. */
LEAF void NAME(rows_bits)(const job *J, int64_t begin, int64_t end, float *scale, int bits) {
    int64_t token = 0;
    for (; token + 4 <= J->n; token += 4) NAME(rows_of)(J, begin, end, token, scale, bits, 2, 4);
    for (; token < J->n; token++) NAME(rows_of)(J, begin, end, token, scale, bits, 4, 1);
}

TARGET static void NAME(rows)(const job *J, int64_t begin, int64_t end) {
    float *scale = calloc(12 * (size_t)J->L->num_groups + 2 * V, 4); /* loads of V may pass the last group */
    if (!scale) { /* no memory: seen, not hidden */
        for (int64_t n = 0; n < J->n; n++)
            for (int64_t row = begin; row < end; row++) J->y[n * J->L->rows + row] = NOT_A_NUMBER;
        return;
    }
    switch (J->L->bits) {
    case 1: NAME(rows_bits)(J, begin, end, scale, 1); break;
    case 2: NAME(rows_bits)(J, begin, end, scale, 2); break;
    case 3: NAME(rows_bits)(J, begin, end, scale, 3); break;
    default: NAME(rows_bits)(J, begin, end, scale, 4);
    }
    free(scale);
}

/* ---- weights ------------------------------------------------------------------------------------------------- */

LEAF void NAME(dequantize_bits)(const fb_layer *L, int64_t row, float *out, const float *scale, int bits) {
    const int lw = lane_width(bits), bytes = V * lw * bits / 8;
    const VF low = NAME(table)(L->levels, bits), high = NAME(table)(L->levels + 8, bits);
    for (int64_t b = 0; b * V * lw < L->width; b++, out += V * lw) {
        VI v = NAME(load)(L->codes + row * L->stride + b * bytes, bits);
        VF s = NAME(scales)(scale + L->first[b], L->lane + V * b);
        UNROLL for (int t = 0; t < lw; t++) STORE_F(out + V * t, MUL_F(s, NAME(levels)(v, bits, t * bits, low, high)));
    }
}

/* One row of the weight, columns in the order of NAME(permute); those beyond the width hold any finite number. */
TARGET static void NAME(dequantize)(const fb_layer *L, int64_t row, float *out) {
    float *scale = calloc((size_t)L->num_groups + V, 4);
    if (!scale) {
        for (int64_t i = 0; i < L->width; i++) out[i] = NOT_A_NUMBER;
        return;
    }
    row_scales(L, row, 1, scale);
    switch (L->bits) {
    case 1: NAME(dequantize_bits)(L, row, out, scale, 1); break;
    case 2: NAME(dequantize_bits)(L, row, out, scale, 2); break;
    case 3: NAME(dequantize_bits)(L, row, out, scale, 3); break;
    default: NAME(dequantize_bits)(L, row, out, scale, 4);
    }
    free(scale);
}
