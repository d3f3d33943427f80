/* The C interface of the CPU kernels, called from Python through ctypes: no torch and no Python headers.
 *
 * Letters as in countdown.ops.call: T tokens, d size of the input, h terms. Strides count elements but where it says
 * bytes. Every pointer may be misaligned; nothing beyond the described elements is read or written. A pointer to what
 * is not there is NULL.
 */
#pragma once

#include <stdint.h>

#ifdef _WIN32
#define COUNTDOWN_API __declspec(dllexport)
#else
#define COUNTDOWN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct below or the meaning of a function changes. */
#define COUNTDOWN_ABI 14

/* Tokens of a call, which may lie anywhere. */
#define COUNTDOWN_MOST_TOKENS 8

/* Integers are for small operations alone. */
enum countdown_dtype { COUNTDOWN_FLOAT32, COUNTDOWN_BFLOAT16, COUNTDOWN_FLOAT16, COUNTDOWN_INT64 };
enum countdown_activation { COUNTDOWN_SILU, COUNTDOWN_GELU_TANH, COUNTDOWN_GELU, COUNTDOWN_RELU };
/* How rows of weights are stored, in the order of FORMATS in formats.hpp; plain ones as the dtypes above. */
enum countdown_format { COUNTDOWN_PLAIN_FLOAT32, COUNTDOWN_PLAIN_BFLOAT16, COUNTDOWN_PLAIN_FLOAT16, COUNTDOWN_INT4 };
/* What makes the active sets, in the order of DECIDERS in deciders.hpp: a projection, both of them, a copy of both in
 * few bits, the input itself, or the caller. */
enum countdown_decider {
    COUNTDOWN_BY_UP,
    COUNTDOWN_BY_GATE,
    COUNTDOWN_BY_COEFFICIENT,
    COUNTDOWN_BY_COPY,
    COUNTDOWN_BY_INPUT,
    COUNTDOWN_GIVEN,
};
/* Of a token: what decides decides; every neuron is active, and nothing is counted; none is, and the result is the bias
 * alone. */
enum countdown_phase { COUNTDOWN_GENERATED, COUNTDOWN_PROMPT, COUNTDOWN_PADDING };

/* A matrix with a row a term, `stride` bytes apart: W_down and a linear are transposed. Its bias has a dtype of its own. */
typedef struct {
    int64_t format;
    const void *data;
    int64_t stride;
    int64_t bias_dtype;
    const void *bias; /* or NULL */
} countdown_weight;

/* A copy of a matrix in 4 bits, in tiles, as countdown.weights.symmetric says. */
typedef struct {
    const uint8_t *levels;  /* [tiles, words, 16] of 4 bytes */
    const uint16_t *scales; /* [tiles, groups, 16], fp16 */
} countdown_copy;

/* What decides on each of T tokens, and by what. */
typedef struct {
    int64_t by;
    const float *per_term; /* [h] thresholds, or NULL where active sets are given */
    const float *second;   /* [h] thresholds of a second look, at the coefficients of what the first leaves; or NULL */
    const uint8_t *active; /* [T, h], each 0 or 1: those that are given, of a linear by input too */
    const uint8_t *phases; /* [T], read anew at each run; NULL where all are generated */
    int64_t looks;         /* that are counted, 1 or 2: all the same where nothing is decided */
    int64_t words, groups; /* of a row of the copies, 0 without them */
    countdown_copy gate, up;
} countdown_decision;

/* What a linear adds for the input channels that a token drops: outer (inner (x of those)), of a low rank. */
typedef struct {
    int64_t rank;                  /* 0 where nothing is added */
    countdown_weight inner, outer; /* h rows of rank, and outputs rows of rank; without biases */
} countdown_compensation;

/* What an FFN adds to each token that is neither dense nor padding: L (x / channels) + bias, with L [outputs, d]. */
typedef struct {
    int64_t words, groups; /* of a row of L, 0 where nothing is added */
    countdown_copy matrix;
    const float *channels; /* [d] */
    const float *bias;     /* [outputs] */
} countdown_affine;

/* A sum over active terms for 1 to 8 tokens: the neurons of a gated FFN, or by input the d = h input channels of a
 * linear, whose one matrix is `down`. */
typedef struct {
    int64_t dtype, tokens, d, h, outputs, activation; /* dtype: of x and y */
    const void *x[COUNTDOWN_MOST_TOKENS];             /* of each token, [d] */
    countdown_weight gate, up, down;                  /* h rows of d, of d, and of outputs */
    countdown_decision decision;
    countdown_compensation added; /* of a linear */
    countdown_affine affine;      /* of an FFN */
    uint8_t *selected; /* [T, h]: if there, only the active sets are computed, into it */
    int64_t *counters; /* [2], or [3] of two looks, or NULL: += generated tokens, and what each look leaves of theirs */
    void *y[COUNTDOWN_MOST_TOKENS]; /* of each token, [outputs] */
    void *workspace;                /* countdown_workspace bytes */
} countdown_sum_call;

/* One to 8 tokens through one to three linears of one format, side by side. */
typedef struct {
    int64_t dtype, tokens, d, count, format; /* dtype: of x, biases and y */
    const void *x[COUNTDOWN_MOST_TOKENS];    /* of each token, [d] */
    const void *weights[3];
    int64_t rows[3], strides[3]; /* in bytes */
    const void *biases[3];
    void *y[COUNTDOWN_MOST_TOKENS]; /* of each token, [sum of rows] */
    void *workspace;
} countdown_project_call;

/* One token's attention: `heads` queries, those of a group in a row, over `length` keys and values of `groups`. */
typedef struct {
    int64_t dtype, heads, groups, length, size;
    const void *q, *keys, *values;
    int64_t q_stride, keys_group_stride, keys_stride, values_group_stride, values_stride;
    const uint8_t *mask; /* [length], 1 where a key is seen, or NULL */
    float scale;
    void *y; /* [heads, size] */
    void *workspace;
} countdown_attend_call;

/* A small operation on floats, computed in float32 and rounded to the dtype of the result; integers are added. */
enum countdown_small {
    COUNTDOWN_COPY,
    COUNTDOWN_ADD,
    COUNTDOWN_MULTIPLY,
    COUNTDOWN_NEGATE,
    COUNTDOWN_SQUARE,
    COUNTDOWN_INVERSE_ROOT,
    COUNTDOWN_MEAN, /* of the last dimension: the result's stride there is 0 */
    COUNTDOWN_ACTIVATE,
    COUNTDOWN_LARGEST, /* likewise; NaN if there is one */
};

typedef struct {
    void *data;
    int64_t dtype, strides[4];
} countdown_tensor;

typedef struct {
    int64_t operation, activation, sizes[4];
    countdown_tensor result, first, second;
    double value;       /* the second operand where `second` has no data */
    const int64_t *at;  /* where in `result` to write, in units of at_stride, below at_limit; or NULL */
    int64_t at_stride, at_limit;
} countdown_small_call;

/* What is done, its call, and in how many parts, which decides the order of sums. A small operation is one. */
enum countdown_kind { COUNTDOWN_SUM, COUNTDOWN_PROJECT, COUNTDOWN_ATTEND, COUNTDOWN_SMALL };

typedef struct {
    int64_t kind, parts;
    const void *call;
} countdown_step;

COUNTDOWN_API int64_t countdown_abi(void);

/* Bytes of workspace that a step's call needs, whose own pointer to one is not looked at. */
COUNTDOWN_API int64_t countdown_workspace(const countdown_step *step);

/* Steps one after the other, each as if it ran alone, on torch's threads: for what stands between operations of torch. */
COUNTDOWN_API void countdown_run(const countdown_step *steps, int64_t count);

/* The same, to the same bits, on threads of the library's own, which wait for each other without spinning for long: for
 * steps between which torch computes nothing in parallel. */
COUNTDOWN_API void countdown_run_apart(const countdown_step *steps, int64_t count);

/* Name of the place-th variant that this CPU runs, the best first, NULL beyond the last. */
COUNTDOWN_API const char *countdown_variant(int place);
/* Take the place-th of them from now on; the first is taken at the start. */
COUNTDOWN_API void countdown_take_variant(int place);

/* Run on the threads of an OpenMP runtime that is loaded already: its GOMP_parallel, GOMP_barrier,
 * omp_get_thread_num and omp_get_num_threads. Without them it has threads of its own. */
COUNTDOWN_API void countdown_use_openmp(void *parallel, void *barrier, void *thread_num, void *num_threads);

#ifdef __cplusplus
}
#endif
