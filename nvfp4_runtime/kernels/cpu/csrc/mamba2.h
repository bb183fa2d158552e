// Mamba-2: causal convolution with SiLU, the selective scan, and the gated norm, all token by token for what a thread has in hand. States
// are read, carried through the step's tokens and written back, so that it does not matter how a prompt is cut.

// log(1 + e^x). With e = e^-|x| in [0, 1]: max(x, 0) + 2 atanh(e / (2 + e)), whose series in s <= 1/3 ends at s^15 (2e-9).
inline V softplus(V x) {
  const V e = vexp(sub(zero(), vabs(x)));
  const V s = div(e, add(set1(2.f), e)), square = mul(s, s);
  V p = set1(1.f / 15);
  p = fma(p, square, set1(1.f / 13));
  p = fma(p, square, set1(1.f / 11));
  p = fma(p, square, set1(1.f / 9));
  p = fma(p, square, set1(1.f / 7));
  p = fma(p, square, set1(1.f / 5));
  p = fma(p, square, set1(1.f / 3));
  p = fma(p, square, set1(1.f));
  return fma(mul(set1(2.f), s), p, vmax(zero(), x));  // a NaN passes
}

template <class T>
void mamba2_steps_as(const Mamba2& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const size_t row = static_cast<size_t>(t) * a.heads;
    const T* dt = static_cast<const T*>(a.dt) + static_cast<size_t>(t) * a.dt_row;
    for (int h = 0; h < a.heads; h += 16) {
      const int left = a.heads - h;
      const V raw = add(load_upto(dt + h, left), load_upto(a.dt_bias + h, left));
      const V step = vmax(set1(a.min_step), softplus(raw));
      store_upto(a.steps + row + h, step, left);
      store_upto(a.decays + row + h, vexp(mul(step, load_upto(a.a + h, left))), left);
    }
  }
}
void mamba2_steps(const Mamba2& a, int begin, int end) {
  a.type == Type::bf16 ? mamba2_steps_as<bf16>(a, begin, end) : mamba2_steps_as<float>(a, begin, end);
}

template <class T>
void mamba2_conv_as(const Mamba2& a, int begin, int end) {
  const int channels = a.conv_dim(), before = a.conv_width - 1;
  for (int item = begin; item < end; item++) {
    const int sequence = item / a.pieces, from = item % a.pieces * kConvPiece;
    const int upto = from + kConvPiece < channels ? from + kConvPiece : channels;
    const int start = a.cu_seqlens[sequence], stop = a.cu_seqlens[sequence + 1], count = stop - start;
    float* state = a.conv_state + static_cast<size_t>(a.slots[sequence]) * before * channels;
    const bool fresh = a.positions[start] == 0;
    for (int c = from; c < upto; c += 16) {
      const int left = upto - c;
      const auto input = [&](int t) {  // the sequence's t-th new token; before 0: what the state holds
        if (t >= 0) return load_upto(static_cast<const T*>(a.xbc) + static_cast<size_t>(start + t) * a.xbc_row + c, left);
        return fresh ? zero() : load_upto(state + static_cast<size_t>(before + t) * channels + c, left);
      };
      for (int t = 0; t < count; t++) {
        V sum = load_upto(a.conv_bias + c, left);
        for (int k = 0; k < a.conv_width; k++)
          sum = fma(input(t - before + k), load_upto(a.conv_weight + static_cast<size_t>(k) * channels + c, left), sum);
        const V silu = div(sum, add(set1(1.f), vexp(sub(zero(), sum))));
        store_upto(a.mixed + static_cast<size_t>(start + t) * channels + c, silu, left);
      }
      // oldest first: what is written is not read again
      for (int k = 0; k < before; k++)
        store_upto(state + static_cast<size_t>(k) * channels + c, input(count - before + k), left);
    }
  }
}
void mamba2_conv(const Mamba2& a, int begin, int end) {
  a.type == Type::bf16 ? mamba2_conv_as<bf16>(a, begin, end) : mamba2_conv_as<float>(a, begin, end);
}

void mamba2_scan(const Mamba2& a, int begin, int end) {
  const int channels = a.conv_dim(), inner = a.inner(), n = a.state;
  for (int item = begin; item < end; item++) {
    const int sequence = item / a.heads, head = item % a.heads, group = head / (a.heads / a.groups);
    const int start = a.cu_seqlens[sequence], stop = a.cu_seqlens[sequence + 1];
    float* state = a.ssm_state + (static_cast<size_t>(a.slots[sequence]) * a.heads + head) * a.head_dim * n;
    if (a.positions[start] == 0)
      for (int i = 0; i < a.head_dim * n; i++) state[i] = 0;
    for (int t = start; t < stop; t++) {
      const float* row = a.mixed + static_cast<size_t>(t) * channels;
      const float* x = row + head * a.head_dim;
      const float* b = row + inner + group * n;
      const float* c = b + a.groups * n;
      const size_t at = static_cast<size_t>(t) * a.heads + head;
      const V decay = set1(a.decays[at]);
      const float step = a.steps[at];
      float* out = a.y + static_cast<size_t>(t) * inner + head * a.head_dim;
      for (int p = 0; p < a.head_dim; p++) {
        float* s = state + static_cast<size_t>(p) * n;
        const V scaled = set1(step * x[p]);
        V sum = zero();
        for (int i = 0; i < n; i += 16) {
          const int left = n - i;
          const V next = fma(load_upto(s + i, left), decay, mul(scaled, load_upto(b + i, left)));
          store_upto(s + i, next, left);
          sum = fma(next, load_upto(c + i, left), sum);
        }
        out[p] = reduce_add(sum) + a.d[head] * x[p];
      }
    }
  }
}

// RMSNorm of y * silu(gate) over each group of channels. Groups need not be whole vectors.
template <class T, class O>
void mamba2_norm_as(const Mamba2& a, int begin, int end) {
  const int inner = a.inner(), width = inner / a.groups;
  for (int t = begin; t < end; t++) {
    const T* gate = static_cast<const T*>(a.gate) + static_cast<size_t>(t) * a.xbc_row;
    float* y = a.y + static_cast<size_t>(t) * inner;
    O* out = static_cast<O*>(a.out) + static_cast<size_t>(t) * inner;
    for (int first = 0; first < inner; first += width) {
      V squares = zero();
      for (int i = 0; i < width; i += 16) {
        const int left = width - i;
        const V g = load_upto(gate + first + i, left);
        const V gated = mul(load_upto(y + first + i, left), div(g, add(set1(1.f), vexp(sub(zero(), g)))));
        store_upto(y + first + i, gated, left);
        squares = fma(gated, gated, squares);
      }
      const V scale = set1(inverse_rms(squares, width, a.eps));
      for (int i = 0; i < width; i += 16) {
        const int left = width - i;
        store_upto(out + first + i, mul(mul(load_upto(y + first + i, left), scale), load_upto(a.norm + first + i, left)), left);
      }
    }
  }
}
void mamba2_norm(const Mamba2& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? mamba2_norm_as<bf16, float>(a, begin, end) : mamba2_norm_as<bf16, bf16>(a, begin, end);
  else
    wide ? mamba2_norm_as<float, float>(a, begin, end) : mamba2_norm_as<float, bf16>(a, begin, end);
}
