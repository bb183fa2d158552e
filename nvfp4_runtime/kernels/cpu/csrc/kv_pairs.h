// Rows of the paged cache as pairs of bfloat16, 64 dimensions at a time: every cached type fits bfloat16 exactly (NVFP4: its
// codes, block scales come later). Keys pair two dimensions, values pair two keys. A 32-bit lane holds a pair, and each
// type has the order of lanes that is cheapest to decode: word h of lane l of a key's chunk holds dimension key_dim(l, h),
// slot s of a chunk of values (vector s / 16, lane s % 16) dimension value_dim(s). Beyond a head's width lie zeros. D is the
// head's width where that is known, 1 for another multiple of 64 and 0 for what is left.
template <int D>
constexpr int width_of(int d) {
  return D > 1 ? D : d;
}

template <class C>
struct Paired;

inline Pairs load_words(const uint8_t* p, bool whole, int n) {  // 32 of 16 bits, n of them there
  return {whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(mask32(n), p)};
}
inline void interleave(Pairs even, Pairs odd, Pairs& low, Pairs& high) {
  low.v = _mm512_unpacklo_epi16(even.v, odd.v);
  high.v = _mm512_unpackhi_epi16(even.v, odd.v);
}

template <>
struct Paired<bf16> {
  static constexpr int kLanes = 16, kDots = 2;  // of a key's sum; instructions a chunk
  static constexpr int key_dim(int l, int h) { return 2 * l + h; }
  static constexpr int value_dim(int s) { return s / 32 * 32 + s % 16 / 4 * 8 + s / 16 % 2 * 4 + s % 4; }
  template <int D>
  void key(const uint8_t* p, int n, Pairs out[2]) const {
    UNROLL for (int i = 0; i < 2; i++) out[i] = load_words(p + 64 * i, D, n - 32 * i);
  }
  template <int D>
  void values(const uint8_t* even, const uint8_t* odd, int n, Pairs out[4]) const {
    UNROLL for (int i = 0; i < 2; i++)
      interleave(load_words(even + 64 * i, D, n - 32 * i), load_words(odd + 64 * i, D, n - 32 * i), out[2 * i], out[2 * i + 1]);
  }
};

// Two look-ups give the bytes of 64 bfloat16 (see E4M3Bytes), interleaving makes them words.
template <>
struct Paired<e4m3> {
  static constexpr int kLanes = 16, kDots = 2;
  static constexpr int key_dim(int l, int h) { return l % 16 / 4 * 16 + l / 16 * 8 + l % 4 * 2 + h; }
  static constexpr int value_dim(int s) { return s % 16 / 4 * 16 + s / 16 * 4 + s % 4; }
  __m512i low0 = _mm512_load_si512(kE4M3Bytes.low), low1 = _mm512_load_si512(kE4M3Bytes.low + 64);
  __m512i high0 = _mm512_load_si512(kE4M3Bytes.high), high1 = _mm512_load_si512(kE4M3Bytes.high + 64);
  static __m512i codes(const uint8_t* p, bool whole, int n) { return whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask64(n), p); }
  void words(__m512i x, Pairs& first, Pairs& second) const {
    const __m512i low = _mm512_permutex2var_epi8(low0, x, low1), magnitude = _mm512_permutex2var_epi8(high0, x, high1);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, x, _mm512_set1_epi8(-128), 0xf8);  // magnitude | sign of x
    first.v = _mm512_unpacklo_epi8(low, high);
    second.v = _mm512_unpackhi_epi8(low, high);
  }
  template <int D>
  void key(const uint8_t* p, int n, Pairs out[2]) const {
    words(codes(p, D, n), out[0], out[1]);
  }
  template <int D>
  void values(const uint8_t* even, const uint8_t* odd, int n, Pairs out[4]) const {
    const __m512i a = codes(even, D, n), b = codes(odd, D, n);
    words(_mm512_unpacklo_epi8(a, b), out[0], out[1]);
    words(_mm512_unpackhi_epi8(a, b), out[2], out[3]);
  }
};

// A 16-bit word holds four codes; vpermw over the table looks at the lowest. Two keys go at once, eight lanes each.
template <>
struct Paired<e2m1x2> {
  static constexpr int kLanes = 8, kDots = 4;
  static constexpr int key_dim(int l, int h) { return l % 8 * 8 + h * 4 + l / 8; }
  static constexpr int value_dim(int s) { return s % 4 * 16 + s % 16 / 4 * 4 + s / 16; }
  Pairs table = pair_table(e2m1_table());
  // word i % 4 * 4 + i / 4 of one key and of the other: neighbouring lanes have the four blocks
  __m512i two_keys = _mm512_setr_epi32(0x100000, 0x140004, 0x180008, 0x1c000c, 0x110001, 0x150005, 0x190009, 0x1d000d, 0x120002, 0x160006,
                                       0x1a000a, 0x1e000e, 0x130003, 0x170007, 0x1b000b, 0x1f000f);
  template <int D>
  static __m512i codes(const uint8_t* one, const uint8_t* other, int n) {
    if (D == 64) return _mm512_loadu_si512(one);  // the other follows
    const __mmask16 words = static_cast<__mmask16>(mask32(n / 4));
    const auto load = [&](const uint8_t* p) {
      return D ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(words, p);
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(load(one)), load(other), 1);
  }
  void decode(__m512i x, Pairs out[4]) const {
    out[0] = decode_pair<0>({x}, table);
    out[1] = decode_pair<4>({x}, table);
    out[2] = decode_pair<8>({x}, table);
    out[3] = decode_pair<12>({x}, table);
  }
  template <int D>
  void keys(const uint8_t* one, const uint8_t* other, int n, Pairs out[4]) const {
    decode(codes<D>(one, other, n), out);
  }
  template <int D>
  void values(const uint8_t* even, const uint8_t* odd, int n, Pairs out[4]) const {
    decode(_mm512_permutexvar_epi16(two_keys, codes<D>(even, odd, n)), out);
  }
};
