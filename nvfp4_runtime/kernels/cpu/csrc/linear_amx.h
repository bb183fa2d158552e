// y = x W^T for several rows by tiles of AMX, with the bits of linear_nvfp4.h: all that a tile computes is a group's sum, and
// that is exact. A tile multiplies pairs of bfloat16 and adds in FP32; its weights are twice the E2M1 values, its activations
// either both digits of x, 256 high and low (sums below 2^24), or the bytes of W4A8 and W4A4 times the power of two in their
// scale. Either way the sum leaves the tile as the float that Digits and Blocks have before their one fused multiply-add.
//
// Bytes would be half the size and need one more tile and three more operations a row to join the digits; pairs need none.
// Near products of tiles a core has one 512-bit unit for floats, not two, so what a row does per group is what counts.
//
// Rows come in blocks of `width`, as even as can be, of at most 16. Per group of 16 k a block holds a tile
// [width][words] and, after the tiles of all blocks, a float for each row that multiplies the weights' scales. K is padded to
// 64: x with zeros, and the floats with -0, which adds nothing to any total.

constexpr int kTileRows = 16;
// The driver cuts x for packing by max_rows, tiles by kTileRows.
static_assert(max_rows(Operand::digits) == kTileRows && max_rows(Operand::int8) == kTileRows &&
              max_rows(Operand::nvfp4) == kTileRows);
// Fewer rows take no longer in linear_nvfp4.h. With weights from memory W4A16 breaks even at 6 rows, W4A8 between 8 and 16.
constexpr int tiles_from(Operand o) { return o == Operand::digits ? 7 : 10; }

constexpr int tile_words(Operand o) { return o == Operand::digits ? 16 : 8; }  // pairs of one row in a group
inline bool in_tiles(Operand o, int m) { return o != Operand::floats && o != Operand::pairs && m >= tiles_from(o); }

struct TileRows {
  int blocks, width, groups;
  TileRows(int m, int k) : blocks((m + kTileRows - 1) / kTileRows), width(0), groups((k + 63) / 64 * 4) {
    if (blocks) width = ((m + blocks - 1) / blocks + 1) / 2 * 2;
  }
  size_t tiles(Operand o) const { return static_cast<size_t>(blocks) * groups * width * tile_words(o); }
  size_t floats() const { return static_cast<size_t>(blocks) * groups * width; }
};

size_t packed_words_amx(Operand o, int m, int k) {
  const TileRows rows(m, k);
  const size_t words = in_tiles(o, m) ? rows.tiles(o) + rows.floats() : packed_words(o, m, k);
  return (words + 15) / 16 * 16;  // the next expert's tiles begin a cache line
}

// ---- activations -----------------------------------------------------------------------------------------------------

// One row's group: its pairs, and the float.
template <Operand operand>
inline float put_pairs(float* out, V x, float global_scale, float inverse_global) {
  if constexpr (operand == Operand::digits) {
    const Integers b = to_digits(x);
    const I high = shl<8>(sar<8>(iadd(b.values, iset1(128))));
    store(out, to_pairs(to_float(high)), 8);
    store(out + 8, to_pairs(to_float(isub(b.values, high))), 8);
    return b.scale * .5f;
  } else {
    V q;
    float scale;
    if constexpr (operand == Operand::nvfp4) {
      const BlockScale b = quantize_group(x, global_scale, inverse_global);
      q = add(b.quantised, b.quantised);
      scale = b.scale * .25f;
    } else {
      const Integers b = to_int8(x);
      q = to_float(b.values);
      scale = b.scale * .5f;
    }
    uint32_t bits_of;
    __builtin_memcpy(&bits_of, &scale, 4);
    if (scale == 0.f || scale != scale) bits_of = 0x3f800000u;
    const I power = iset1(static_cast<int32_t>(bits_of & 0x7f800000u));
    store(out, to_pairs(mul(q, from_bits(power))), 8);
    bits_of = (bits_of & 0x7fffffu) | 0x3f800000u;
    float mantissa;
    __builtin_memcpy(&mantissa, &bits_of, 4);
    return scale == scale ? mantissa : scale;
  }
}

// Sixteen groups at once, as put_sixteen; `step` floats lie between groups' pairs, `width` between their floats.
template <Operand operand>
inline bool put_sixteen_pairs(float* out, size_t step, float* floats, int width, const V* x, float global_scale,
                              float inverse_global) {
  V scale, inverse;
  if (!sixteen_scales<operand>(x, global_scale, inverse_global, &scale, &inverse)) return false;
  float inverses[16], powers[16], factors[16];
  store(inverses, inverse);
  if constexpr (operand == Operand::digits) {
    store(factors, scale);
  } else {
    const I of = bits(select(less(zero(), scale), scale, set1(1.f)));
    store(powers, from_bits(iand(of, iset1(0x7f800000))));
    store(factors, from_bits(ior(iand(of, iset1(0x7fffff)), iset1(0x3f800000))));
  }
  for (int g = 0; g < 16; g++) {
    V y = mul(x[g], set1(inverses[g]));
    if constexpr (operand == Operand::digits) {
      const I values = to_int(y), high = shl<8>(sar<8>(iadd(values, iset1(128))));
      store(out + g * step, to_pairs(to_float(high)), 8);
      store(out + g * step + 8, to_pairs(to_float(isub(values, high))), 8);
    } else {
      if constexpr (operand == Operand::nvfp4) {
        y = round_e2m1(y);
        y = add(y, y);
      }
      store(out + g * step, to_pairs(mul(to_float(to_int(y)), set1(powers[g]))), 8);
    }
    floats[g * width] = factors[g];
  }
  return true;
}

template <class T, Operand operand>
void pack_tiles(const PackX& a, int block) {
  constexpr int words = tile_words(operand);
  const float global_scale = 1.0f / a.input_scale, inverse_global = 1.0f / global_scale;
  const TileRows r(a.m, a.k);
  const size_t first = static_cast<size_t>(block) * r.groups * r.width;
  float* tiles = reinterpret_cast<float*>(a.packed) + first * words;
  float* floats = reinterpret_cast<float*>(a.packed) + r.tiles(operand) + first;
  for (int i = 0; i < r.width; i++) {
    const int row = block * r.width + i;
    const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(row) * a.k;
    const int groups = row < a.m ? a.k / kGroup : 0;
    for (int g = 0; g < r.groups; g++) {
      const size_t at = static_cast<size_t>(g) * r.width + i;
      if (g + 16 <= groups) {
        V values[16];
        UNROLL for (int j = 0; j < 16; j++) values[j] = load(x + (g + j) * kGroup);
        const size_t step = static_cast<size_t>(r.width) * words;
        if (put_sixteen_pairs<operand>(tiles + at * words, step, floats + at, r.width, values, global_scale, inverse_global)) {
          g += 15;
          continue;
        }
      }
      if (g < groups) {
        floats[at] = put_pairs<operand>(tiles + at * words, load(x + g * kGroup), global_scale, inverse_global);
      } else {
        store(tiles + at * words, zero(), words);
        floats[at] = -0.f;
      }
    }
  }
}

template <class T>
void pack_tiles_of(const PackX& a, int block) {
  switch (a.operand) {
    case Operand::digits: pack_tiles<T, Operand::digits>(a, block); break;
    case Operand::nvfp4: pack_tiles<T, Operand::nvfp4>(a, block); break;
    default: pack_tiles<T, Operand::int8>(a, block); break;
  }
}
void pack_x_amx(const PackX& a, int begin, int end) {
  if (!in_tiles(a.operand, a.m)) return pack_x(a, begin, end);
  for (int b = begin; b < end; b++) a.type == Type::bf16 ? pack_tiles_of<bf16>(a, b) : pack_tiles_of<float>(a, b);
}

// ---- tiles: 0 and 1 hold activations, 2 and 3 weights, 4 to 7 sums ------------------------------------------------------

// Written out because GCC 12's intrinsics do not say that they read memory.
template <int tile>
ALWAYS_INLINE void load_tile(const void* from, long stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
ALWAYS_INLINE void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(64l), "i"(tile) : "memory");
}
template <int tile, int x, int w>
ALWAYS_INLINE void multiply_tiles() {
  asm volatile("tilezero %%tmm%c0\n\ttdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(tile), "i"(x), "i"(w));
}

class alignas(64) TileShapes {
 public:
  TileShapes(int rows, int words) {
    for (int t = 0; t < 8; t++) {
      bytes_[t] = static_cast<uint16_t>(t < 2 ? 4 * words : 64);
      rows_[t] = static_cast<uint8_t>(t == 2 || t == 3 ? words : rows);
    }
    asm volatile("ldtilecfg (%0)" : : "r"(this) : "memory");
  }
  ~TileShapes() { asm volatile("tilerelease"); }  // else every switch of threads saves eight tiles

 private:
  uint8_t palette_ = 1, start_ = 0, reserved_[14] = {};
  uint16_t bytes_[16] = {};
  uint8_t rows_[16] = {};
};

// One group's weights as a tile: eight rows of pairs, and for digits the same eight again.
inline Pairs doubled_pair_table() { return pair_table(add(e2m1_table(), e2m1_table())); }
template <int words>
ALWAYS_INLINE void decode_group(const uint8_t* codes, Pairs table, uint8_t* out) {
  UNROLL for (int h = 0; h < 2; h++) {
    const I line = load_codes(codes + 64 * h);
    const Pairs w[4] = {decode_pair<0>(line, table), decode_pair<4>(line, table), decode_pair<8>(line, table),
                        decode_pair<12>(line, table)};
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int copy = 0; copy < words / 8; copy++) _mm512_store_si512(out + 512 * copy + 256 * h + 64 * i, w[i].v);
  }
}

// M rows times the 16 of a panel, over blocks of 64 k. The four groups of a block lie in tiles 4 to 7: sums are stored two
// products after their own, and met by their scales two stores later, so that nobody waits. Weights are decoded one block
// ahead.
template <int M, int words>
struct Chain {
  static constexpr int kTileBytes = 64 * words, kBlockPairs = 4 * kTileBytes;
  const LinearNVFP4& a;
  const uint8_t* w;  // the block whose products come next
  uint8_t* ring;     // two blocks of weights as pairs
  const uint32_t* x;
  const float* scale;
  Pairs table;
  float (*sums)[16 * M];  // of the four tiles

  template <int i, bool first, bool last, bool next>
  ALWAYS_INLINE void group(int block, V* total) {
    if constexpr (!last) {
      load_tile<2 + i % 2>(ring + block % 2 * kBlockPairs + i * kTileBytes, 64);
      load_tile<i % 2>(x + i * M * words, 4 * words);
      multiply_tiles<4 + i, i % 2, 2 + i % 2>();
    }
    constexpr int done = (i + 2) % 4;
    if constexpr (i >= 2 ? !last : !first) store_tile<4 + done>(sums[done]);
    if constexpr (next) {
      const uint8_t *ahead = w + kBlockBytes, *codes = ahead + 64 + 128 * i;
      prefetch_group(ahead, codes, i);
      decode_group<words>(codes, table, ring + (block + 1) % 2 * kBlockPairs + i * kTileBytes);
    }
    if constexpr (!first) {
      const V scales = scales_of(a, w - kBlockBytes + 16 * i);
      UNROLL for (int m = 0; m < M; m++)
        total[m] = fma(load(sums[i] + 16 * m), mul(scales, set1(scale[(i - 4) * M + m])), total[m]);
    }
  }
  template <bool first, bool last, bool next>
  ALWAYS_INLINE void step(int block, V* total) {
    group<0, first, last, next>(block, total);
    group<1, first, last, next>(block, total);
    group<2, first, last, next>(block, total);
    group<3, first, last, next>(block, total);
    w += kBlockBytes;
    x += 4 * M * words;
    scale += 4 * M;
  }
  ALWAYS_INLINE void run(int blocks, V* total) {
    for (int i = 0; i < 4; i++) decode_group<words>(w + 64 + 128 * i, table, ring + i * kTileBytes);
    if (blocks == 1) {
      step<true, false, false>(0, total);
    } else {
      step<true, false, true>(0, total);
      int b = 1;
      for (; b < blocks - 1; b++) step<false, false, true>(b, total);
      step<false, false, false>(b, total);
    }
    step<false, true, false>(blocks, total);
  }
};

template <class O, int M, int words>
void tiles_of_width(const LinearNVFP4& a, const TileRows& r, int begin, int end) {
  alignas(64) uint8_t ring[2 * Chain<M, words>::kBlockPairs];
  alignas(64) float sums[4][16 * M];
  const float* factors = reinterpret_cast<const float*>(a.x) + r.tiles(a.operand);
  for (int b = 0; b < r.blocks; b++)
    for (int p = begin; p < end; p++) {
      const size_t at = static_cast<size_t>(b) * r.groups * M;
      const uint8_t* w = a.weights + p * panel_bytes(a.k);
      Chain<M, words> chain{a, w, ring, a.x + at * words, factors + at, doubled_pair_table(), sums};
      V total[M];
      UNROLL for (int m = 0; m < M; m++) total[m] = zero();
      chain.run(r.groups / 4, total);
      V kept[M];  // not `total`: an index known only at run time would have kept that in memory all the while
      UNROLL for (int m = 0; m < M; m++) kept[m] = total[m];
      finish_panel<O>(a, p, b * M, a.m - b * M < M ? a.m - b * M : M, kept);
    }
}

template <class O, int words>
void linear_tiles(const LinearNVFP4& a, int begin, int end) {
  const TileRows r(a.m, a.k);
  const TileShapes shapes(r.width, words);
#define NVFP4_WIDTH(M) \
  case M: tiles_of_width<O, M, words>(a, r, begin, end); break;
  switch (r.width) {
    NVFP4_WIDTH(8)
    NVFP4_WIDTH(10)
    NVFP4_WIDTH(12)
    NVFP4_WIDTH(14)
    NVFP4_WIDTH(16)
  }
#undef NVFP4_WIDTH
}

template <class O>
void linear_amx_as(const LinearNVFP4& a, int begin, int end) {
  tile_words(a.operand) == 16 ? linear_tiles<O, 16>(a, begin, end) : linear_tiles<O, 8>(a, begin, end);
}
void linear_nvfp4_amx(const LinearNVFP4& a, int begin, int end) {
  if (!in_tiles(a.operand, a.m)) return linear_nvfp4(a, begin, end);
  a.out_type == Type::bf16 ? linear_amx_as<bf16>(a, begin, end) : linear_amx_as<float>(a, begin, end);
}
