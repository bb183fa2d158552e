// Rows of the paged cache widened to FP32, 64 dimensions at a time as four vectors. Each type has the order of lanes that
// is cheapest to decode: slot s of a chunk (vector s / 16, lane s % 16) holds dimension dim_of(s). Queries are brought
// into that order once, results back once; what lies between never asks. Slots beyond the head's width hold zeros.

constexpr int kChunk = 64;
constexpr int kPiece = 16;        // keys looked at together; a block of the cache is cut into pieces
constexpr int kMaxGroups = kMaxHeadDim / 16;
constexpr int kScales = (kPiece + 1) * kMaxGroups + 64;  // floats widen_scales may write, and a key's four past the last

template <int n>
struct Count {
  static constexpr int value = n;
};

// Sums over lanes, several vectors at once; lane i of the result belongs to vector i.
#if defined(__AVX512F__)
constexpr int kSums = 16;
ALWAYS_INLINE V add_lanes(const V* x) { return reduce16(x); }
inline void store_from(float* p, V x, int from, int n) {  // lanes from .. from + n - 1
  _mm512_mask_storeu_ps(p - from, static_cast<__mmask16>(lanes(n) << from), x.v);
}
#else
constexpr int kSums = 4;
ALWAYS_INLINE V add_lanes(const V* x) {
  float t[16] = {};
  for (int i = 0; i < kSums; i++) t[i] = reduce_add(x[i]);
  return load(t);
}
inline void store_from(float* p, V x, int from, int n) {
  float t[16];
  store(t, x);
  for (int i = 0; i < n; i++) p[i] = t[from + i];
}
#endif
inline float exp1(float x) {
  float t[16];
  store(t, vexp(set1(x)));
  return t[0];
}

template <class C>
struct Cached;  // row_bytes(d), widen<Whole>(bytes of a chunk, its block scales, its width n, out); Whole: n >= 64

#if defined(__AVX512VBMI__)
inline __mmask32 mask32(int n) { return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : static_cast<__mmask32>((1u << n) - 1); }
inline __mmask64 mask64(int n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

template <>
struct Cached<bf16> {
  static constexpr int row_bytes(int d) { return 2 * d; }
  static constexpr int dim_of(int s) { return s / 32 * 32 + 2 * (s % 16) + s / 16 % 2; }  // even and odd ones apart
  template <bool Whole>
  void widen(const uint8_t* p, const float*, int n, V out[4]) const {
    const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int i = 0; i < 2; i++) {
      const __m512i x = Whole ? _mm512_loadu_si512(p + 64 * i) : _mm512_maskz_loadu_epi16(mask32(n - 32 * i), p + 64 * i);
      out[2 * i] = from_bits({_mm512_slli_epi32(x, 16)});
      out[2 * i + 1] = from_bits({_mm512_and_si512(x, odd)});
    }
  }
};

// The 128 magnitudes of E4M3 as bfloat16, low and high bytes apart: two look-ups widen 64 of them, NaN included.
struct E4M3Bytes {
  alignas(64) uint8_t low[128], high[128];
};
constexpr E4M3Bytes e4m3_bytes() {
  E4M3Bytes t{};
  for (int i = 0; i < 128; i++) {
    int exponent = i >> 3, mantissa = i & 7;
    unsigned bits = 0;
    if (i == 127) {
      bits = 0x7fc0;
    } else if (exponent) {
      bits = static_cast<unsigned>((exponent + 120) << 7 | mantissa << 4);
    } else if (mantissa) {  // mantissa * 2^-9, brought to 1.xxx
      int shift = mantissa >= 4 ? 1 : mantissa >= 2 ? 2 : 3;
      bits = static_cast<unsigned>((121 - shift) << 7 | ((mantissa << shift) & 7) << 4);
    }
    t.low[i] = static_cast<uint8_t>(bits & 255);
    t.high[i] = static_cast<uint8_t>(bits >> 8);
  }
  return t;
}
constexpr E4M3Bytes kE4M3Bytes = e4m3_bytes();

template <>
struct Cached<e4m3> {
  __m512i low0 = _mm512_load_si512(kE4M3Bytes.low), low1 = _mm512_load_si512(kE4M3Bytes.low + 64);
  __m512i high0 = _mm512_load_si512(kE4M3Bytes.high), high1 = _mm512_load_si512(kE4M3Bytes.high + 64);
  static constexpr int row_bytes(int d) { return d; }
  static constexpr int dim_of(int s) { return s % 16 / 4 * 16 + s / 32 * 8 + s % 4 * 2 + s / 16 % 2; }
  template <bool Whole>
  void widen(const uint8_t* p, const float*, int n, V out[4]) const {
    widen_codes(Whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask64(n), p), out);
  }
  void widen_codes(__m512i x, V out[4]) const {
    const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    const __m512i low = _mm512_permutex2var_epi8(low0, x, low1), magnitude = _mm512_permutex2var_epi8(high0, x, high1);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, x, _mm512_set1_epi8(-128), 0xf8);  // magnitude | sign of x
    const __m512i words[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int i = 0; i < 2; i++) {
      out[2 * i] = from_bits({_mm512_slli_epi32(words[i], 16)});
      out[2 * i + 1] = from_bits({_mm512_and_si512(words[i], odd)});
    }
  }
};
struct Places {
  alignas(64) uint8_t at[64] = {};
};
constexpr Places scale_places() {  // which of 64 bytes goes where, so that they come out of widen_codes in order
  Places p{};
  for (int s = 0; s < 64; s++) p.at[Cached<e4m3>::dim_of(s)] = static_cast<uint8_t>(s);
  return p;
}

// Four codes to a 32-bit lane, so that four lanes share a block scale in every vector.
template <>
struct Cached<e2m1x2> {
  V table = e2m1_table();
  __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  static constexpr int row_bytes(int d) { return d / 2; }
  static constexpr int dim_of(int s) { return 4 * (s % 16) + s / 16; }
  template <bool Whole>
  void widen(const uint8_t* p, const float* scales, int n, V out[4]) const {
    const __mmask16 words = static_cast<__mmask16>(mask32(n / 4));
    const __m256i bytes = Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(words, p);
    const I codes = {_mm512_cvtepu16_epi32(bytes)};
    const __m512 four = _mm512_zextps128_ps512(_mm_loadu_ps(scales));  // of blocks beyond n: not used
    const V scale = {Whole ? _mm512_permutexvar_ps(spread, four) : _mm512_maskz_permutexvar_ps(words, spread, four)};
    out[0] = mul(decode<0>(codes, table), scale);
    out[1] = mul(decode<4>(codes, table), scale);
    out[2] = mul(decode<8>(codes, table), scale);
    out[3] = mul(decode<12>(codes, table), scale);
  }
};

struct Order {
  alignas(64) int32_t at[kChunk];
};
template <class C>
constexpr Order order_of(bool inverse) {
  Order o{};
  for (int s = 0; s < kChunk; s++) {
    if (inverse) o.at[Cached<C>::dim_of(s)] = s;
    else o.at[s] = Cached<C>::dim_of(s);
  }
  return o;
}
// x[i] becomes the old x[order[i]], over 64 lanes.
inline void permute64(V x[4], const Order& order) {
  const V old[4] = {x[0], x[1], x[2], x[3]};
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512i at = _mm512_load_si512(order.at + 16 * i);
    const __m512 a = _mm512_permutex2var_ps(old[0].v, at, old[1].v), b = _mm512_permutex2var_ps(old[2].v, at, old[3].v);
    x[i] = {_mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(32)), a, b)};
  }
}
template <class C>
inline void to_slots(V x[4]) {
  static constexpr Order order = order_of<C>(false);
  permute64(x, order);
}
template <class C>
inline void to_dims(V x[4]) {
  static constexpr Order order = order_of<C>(true);
  permute64(x, order);
}
#else
template <class C>
struct Cached {
  static constexpr int row_bytes(int d) { return d * static_cast<int>(sizeof(C)); }
  template <bool>
  void widen(const uint8_t* p, const float*, int n, V out[4]) const {
    for (int i = 0; i < 4; i++) out[i] = n > 16 * i ? load_upto(reinterpret_cast<const C*>(p) + 16 * i, n - 16 * i) : zero();
  }
};
template <>
struct Cached<e2m1x2> {
  static constexpr int row_bytes(int d) { return d / 2; }
  template <bool>
  void widen(const uint8_t* p, const float* scales, int n, V out[4]) const {
    static constexpr float value[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
    for (int i = 0; i < 4; i++) {
      float x[16] = {};
      for (int j = 0; j < 8 && 16 * i < n; j++) {
        x[2 * j] = value[p[8 * i + j] & 15];
        x[2 * j + 1] = value[p[8 * i + j] >> 4];
      }
      out[i] = mul(load(x), set1(16 * i < n ? scales[i] : 0.f));
    }
  }
};
template <class C>
inline void to_slots(V[4]) {}
template <class C>
inline void to_dims(V[4]) {}
#endif
#if defined(__AVX512VBMI__)
template <>
struct Cached<float> {
  static constexpr int row_bytes(int d) { return 4 * d; }
  static constexpr int dim_of(int s) { return s; }
  template <bool>
  void widen(const uint8_t* p, const float*, int n, V out[4]) const {
    for (int i = 0; i < 4; i++)
      out[i] = {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask32(n - 16 * i)), p + 64 * i)};
  }
};
#endif

// One sequence's keys or values of one KV head, found through its block table.
struct Rows {
  const uint8_t* base;    // rows of the head in block 0
  const uint8_t* scales;  // its block scales, or null
  const int32_t* table;
  size_t block_stride, scale_stride;      // bytes from block to block
  size_t head_stride, scale_head_stride;  // and from head to head
  int row_bytes, groups, block_size;
  int visible;  // positions a prefetch may reach
};
// Up to kPiece keys that lie side by side.
struct Piece {
  const uint8_t* rows;
  const uint8_t* scales;
  int count;
};
inline Piece piece_at(const Rows& r, int position, int last) {
  const int block = position / r.block_size, offset = position - block * r.block_size;
  int count = r.block_size - offset;
  if (count > last - position) count = last - position;
  if (count > kPiece) count = kPiece;
  const size_t b = static_cast<size_t>(r.table[block]);
  return {r.base + b * r.block_stride + static_cast<size_t>(offset) * r.row_bytes,
          r.scales ? r.scales + b * r.scale_stride + static_cast<size_t>(offset) * r.groups : nullptr, count};
}
inline void next_head(const Rows& r, Piece& p) {
  p.rows += r.head_stride;
  if (p.scales) p.scales += r.scale_head_stride;
}
inline Rows head_of_rows(Rows r, int head) {
  r.base += r.head_stride * static_cast<size_t>(head);
  if (r.scales) r.scales += r.scale_head_stride * static_cast<size_t>(head);
  return r;
}
// Asks memory for a piece, into the second-level cache: that takes more requests at a time than the first level does.
inline void prefetch_piece(const Rows& r, const Piece& p) {
  for (int i = 0; i < p.count * r.row_bytes; i += 64) __builtin_prefetch(p.rows + i, 0, 2);
  if (p.scales)
    for (int i = 0; i < p.count * r.groups; i += 64) __builtin_prefetch(p.scales + i, 0, 2);
}
#if defined(__AVX512VBMI__)
// 64 of them: two look-ups give the bytes of their bfloat16 values; the first permutation undoes the order those come in.
inline void widen_64_scales(const uint8_t* p, int n, float* out) {
  static constexpr Places places = scale_places();
  const __m512i x = _mm512_permutexvar_epi8(_mm512_load_si512(places.at), n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask64(n), p));
  V wide[4];
  Cached<e4m3>{}.widen_codes(x, wide);
  UNROLL for (int i = 0; i < 4; i++) store(out + 16 * i, wide[i]);
}
#endif
// Block scales of a piece as FP32, or nothing where the type has none.
inline const float* widen_scales(const Rows& r, const Piece& p, float* out) {
  if (!p.scales) return out;
  const int n = p.count * r.groups;
#if defined(__AVX512VBMI__)
  for (int i = 0; i < n; i += 64) widen_64_scales(p.scales + i, n - i, out + i);
#else
  for (int i = 0; i < n; i += 16) store(out + i, from_e4m3(load_bytes(p.scales + i, n - i < 16 ? n - i : 16)));
#endif
  return out;
}

#if defined(__AVX512BF16__)
#include "kv_pairs.h"
#endif
