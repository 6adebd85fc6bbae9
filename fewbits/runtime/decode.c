/* One token through the blocks of a Llama-like model, keys and values in a static cache (included by kernels.c).
 *
 *   h = x + O attention(rope(Q n), rope(K n), V n), n = rmsnorm(x);   x = h + D (silu(G m) * (U m)), m = rmsnorm(h)
 *
 * Matrices that share an input share its permuted (or rounded) form and one call of the pool. */
#include <math.h>

enum { Q, K, VALUE, O, GATE, UP, DOWN, LAYERS };
enum { NORM_IN, NORM_POST, NORM_Q, NORM_K, NORMS };

typedef struct {
    const fb_layer *layer[LAYERS];
    const float *bias[LAYERS]; /* or NULL */
    const float *norm[NORMS];  /* the last two or NULL */
    float *keys, *values;      /* (kv_heads, max_length, head_dim) */
    int32_t int8[LAYERS];
} fb_block;

typedef struct {
    const fb_block *blocks;
    int64_t num_blocks, hidden, inner, heads, kv_heads, head_dim, max_length;
    float eps, scale;
} fb_stack;

int fb_block_abi(void) { return (int)sizeof(fb_block); }
int fb_stack_abi(void) { return (int)sizeof(fb_stack); }

/* ---- products -------------------------------------------------------------------------------------------------- */

typedef struct {
    job part[3];
    int64_t start[4];
    int count;
} jobs;

static void jobs_rows(void *arg, int64_t begin, int64_t end) {
    const jobs *A = arg;
    for (int i = 0; i < A->count; i++) {
        int64_t b = begin > A->start[i] ? begin : A->start[i], e = end < A->start[i + 1] ? end : A->start[i + 1];
        if (b < e) linear_rows((void *)&A->part[i], b - A->start[i], e - A->start[i]);
    }
}

/* Whether the activations of two layers look the same to the kernels. */
INLINE int alike(const fb_layer *a, const fb_layer *b) {
    return a->variant == b->variant && a->bits == b->bits && a->group == b->group && a->twice_zero == b->twice_zero;
}

/* y[i] = layer i of `count` from `first` on, times x; `memory` holds the prepared activations of all of them. */
static void products(const fb_block *B, int first, int count, const float *x, float **y, uint8_t *memory, int threads) {
    jobs A = {.count = count};
    for (int i = 0; i < count; i++) {
        const fb_layer *L = B->layer[first + i];
        int int8 = B->int8[first + i];
        if (i && alike(L, B->layer[first]) && int8 == B->int8[first]) {
            A.part[i] = A.part[0];
            A.part[i].L = L, A.part[i].y = y[i];
        } else {
            size_t starts[5];
            size_t size = job_sizes(L, 1, int8, starts);
            A.part[i] = (job){.L = L, .y = y[i], .x = x, .padded = fb_padded_width(L), .n = 1, .int8 = int8};
            if (size) job_prepare(&A.part[i], x, memory, starts);
            memory += size;
        }
        A.start[i + 1] = A.start[i] + L->rows;
    }
    pool_run(jobs_rows, &A, A.start[count], B->layer[first]->width, UNIT_ROWS, threads);
    for (int i = 0; i < count; i++)
        if (B->bias[first + i])
            for (int64_t r = 0; r < B->layer[first + i]->rows; r++) y[i][r] += B->bias[first + i][r];
}

/* ---- the rest, plain C; 8 lanes in the compiler's own vectors ------------------------------------------------------ */

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE float dot(const float *a, const float *b, int64_t n) {
    v8 sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++) sum[k] += *(const v8 *)(a + i + 8 * k) * *(const v8 *)(b + i + 8 * k);
    for (; i + 8 <= n; i += 8) sum[0] += *(const v8 *)(a + i) * *(const v8 *)(b + i);
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = ((sum[0][0] + sum[0][4]) + (sum[0][1] + sum[0][5])) + ((sum[0][2] + sum[0][6]) + (sum[0][3] + sum[0][7]));
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

INLINE void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *out) {
    float r = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * r);
}

/* cos and sin have head_dim entries; a head turns in pairs (i, i + head_dim / 2). */
INLINE void rope(float *x, const float *cosine, const float *sine, int64_t n) {
    for (int64_t i = 0, half = n / 2; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

typedef struct {
    const fb_stack *S;
    const fb_block *B;
    const float *q;
    float *scores, *out; /* (heads, max_length), (heads, head_dim) */
    int64_t length;
} heads_task;

INLINE void attend(const heads_task *T, int64_t head) {
    const fb_stack *S = T->S;
    const int64_t d = S->head_dim, from = head / (S->heads / S->kv_heads) * S->max_length * d;
    const float *q = T->q + head * d, *keys = T->B->keys + from, *values = T->B->values + from;
    float *p = T->scores + head * S->max_length, *out = T->out + head * d, top = -INFINITY, total = 0.0f;
    for (int64_t t = 0; t < T->length; t++) {
        p[t] = dot(q, keys + t * d, d) * S->scale;
        top = p[t] > top ? p[t] : top;
    }
    for (int64_t t = 0; t < T->length; t++) total += p[t] = expf(p[t] - top);
    memset(out, 0, (size_t)d * 4);
    for (int64_t t = 0; t < T->length; t++) {
        float weight = p[t] / total;
        for (int64_t i = 0; i < d; i++) out[i] += weight * values[t * d + i];
    }
}

INLINE void attend_heads(void *arg, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++) attend(arg, head);
}

static void attend_plain(void *arg, int64_t begin, int64_t end) { attend_heads(arg, begin, end); }
#if FB_X86
__attribute__((target("avx2,fma"))) static void attend_avx2(void *arg, int64_t begin, int64_t end) {
    attend_heads(arg, begin, end);
}
#endif

static row_task attention(void) {
#if FB_X86
    if (fb_supports(AVX2)) return attend_avx2;
#endif
    return attend_plain;
}

/* ---- a token ------------------------------------------------------------------------------------------------------- */

static size_t prepared_bytes(const fb_block *B, int first, int count) {
    size_t total = 0, starts[5];
    for (int i = first; i < first + count; i++) total += job_sizes(B->layer[i], 1, B->int8[i], starts);
    return total;
}

/* x (hidden), the embedded token, becomes the output of the last block. The caller has put keys and values of
 * `position` tokens into the cache; this one's are added. Returns 0, or 1 when memory ran out. */
int fb_decode(const fb_stack *S, float *x, const float *cosine, const float *sine, int64_t position, int threads) {
    const int64_t d = S->head_dim, nq = S->heads * d, nkv = S->kv_heads * d;
    size_t floats = (size_t)(S->hidden * 2 + nq * 2 + nkv * 2 + S->inner * 2 + S->heads * S->max_length), bytes = 0;
    for (int64_t b = 0; b < S->num_blocks; b++) {
        const int spans[4][2] = {{Q, 3}, {O, 1}, {GATE, 2}, {DOWN, 1}};
        for (int i = 0; i < 4; i++) {
            size_t need = prepared_bytes(S->blocks + b, spans[i][0], spans[i][1]);
            bytes = need > bytes ? need : bytes;
        }
    }
    floats = (floats + 15) / 16 * 16;
    uint8_t *memory = aligned_alloc(64, floats * 4 + (bytes + 63) / 64 * 64);
    if (!memory) return 1;
    uint8_t *prepared = memory + floats * 4;
    float *normed = (float *)memory, *added = normed + S->hidden, *q = added + S->hidden, *mixed = q + nq;
    float *k = mixed + nq, *v = k + nkv, *gate = v + nkv, *up = gate + S->inner, *scores = up + S->inner;
    row_task attend_rows = attention();
    for (int64_t b = 0; b < S->num_blocks; b++) {
        const fb_block *B = S->blocks + b;
        rms_norm(x, B->norm[NORM_IN], S->hidden, S->eps, normed);
        products(B, Q, 3, normed, (float *[]){q, k, v}, prepared, threads);
        for (int64_t h = 0; h < S->heads; h++) {
            if (B->norm[NORM_Q]) rms_norm(q + h * d, B->norm[NORM_Q], d, S->eps, q + h * d);
            rope(q + h * d, cosine, sine, d);
        }
        for (int64_t h = 0; h < S->kv_heads; h++) {
            if (B->norm[NORM_K]) rms_norm(k + h * d, B->norm[NORM_K], d, S->eps, k + h * d);
            rope(k + h * d, cosine, sine, d);
            memcpy(B->keys + (h * S->max_length + position) * d, k + h * d, (size_t)d * 4);
            memcpy(B->values + (h * S->max_length + position) * d, v + h * d, (size_t)d * 4);
        }
        heads_task T = {S, B, q, scores, mixed, position + 1};
        pool_run(attend_rows, &T, S->heads, 2 * d * (position + 1), 1, threads);
        products(B, O, 1, mixed, &added, prepared, threads);
        for (int64_t i = 0; i < S->hidden; i++) x[i] += added[i];
        rms_norm(x, B->norm[NORM_POST], S->hidden, S->eps, normed);
        products(B, GATE, 2, normed, (float *[]){gate, up}, prepared, threads);
        for (int64_t i = 0; i < S->inner; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
        products(B, DOWN, 1, gate, &added, prepared, threads);
        for (int64_t i = 0; i < S->hidden; i++) x[i] += added[i];
    }
    free(memory);
    return 0;
}
