// The binding of the decoder and its bodies; see module.cpp.
#include "binding.h"

void bind_decoder(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> no_gil;
  nb::class_<Body>(m, "Body");

  nb::class_<AttentionBody, Body>(m, "AttentionBody")
      .def(
          "__init__",
          [](AttentionBody* self, Context& context, int stream, int input, const Linear& qkv, const Linear& o, Address cos,
             Address sin, int64_t num_positions, Address q_norm, Address k_norm, int norm_type, float eps, int heads, int kv_heads,
             int head_dim, int rotary_dim, float scale, int window, Address sinks) {
            auto* body = new (self) AttentionBody(context, Type(stream), Type(input), qkv, o);
            Rope& rope = body->rope;
            rope.type = Type(stream);
            rope.cos = at<const float>(cos);
            rope.sin = at<const float>(sin);
            rope.q_norm = at(q_norm, norm_type);
            rope.k_norm = at(k_norm, norm_type);
            rope.norm_type = Type(norm_type);
            rope.eps = eps;
            rope.heads = heads;
            rope.kv_heads = kv_heads;
            rope.head_dim = head_dim;
            rope.rotary_dim = rotary_dim;
            Attention& a = body->attention;
            a.type = Type(stream);
            a.out_type = Type(input);
            a.scale = scale;
            a.heads = heads;
            a.kv_heads = kv_heads;
            a.head_dim = head_dim;
            a.window = window;
            a.sinks = at<const float>(sinks);
            body->num_positions = num_positions;
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("set_cache", [](AttentionBody& b, Address k, Address v, int type, float k_scale, float v_scale, int num_blocks,
                           int block_size, Address k_blocks, Address v_blocks) {
        b.attention.k = b.rope.k = at(k, type);
        b.attention.v = b.rope.v = at(v, type);
        b.rope.kv_type = b.attention.kv_type = Type(type);
        b.rope.k_scale = b.attention.k_scale = k_scale;
        b.rope.v_scale = b.attention.v_scale = v_scale;
        b.rope.block_size = b.attention.block_size = block_size;
        b.attention.k_blocks = b.rope.k_blocks = at<uint8_t>(k_blocks);
        b.attention.v_blocks = b.rope.v_blocks = at<uint8_t>(v_blocks);
        b.num_blocks = num_blocks;
      });

  nb::class_<FeedForward, Body>(m, "FeedForward")
      .def(
          "__init__",
          [](FeedForward* self, Context& context, int stream, int input, const Linear& up, const Linear& down, bool gated,
             std::tuple<int, float, float> gate) {
            auto* body = new (self) FeedForward(context, Type(stream), Type(input), up, down, gated);
            body->activation.gate = Gate(std::get<0>(gate));
            body->activation.alpha = std::get<1>(gate);
            body->activation.limit = std::get<2>(gate);
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>());

  nb::class_<MixtureBody, Body>(m, "MixtureBody")
      .def(nb::init<Context&, Mixture&, FeedForward*, const Linear*>(), "context"_a, "mixture"_a, "shared"_a.none(),
           "gate"_a.none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>());

  nb::class_<LatentBody, Body>(m, "LatentBody")
      .def(nb::init<Context&, LatentLayer&, const Linear&, const Linear&>(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("set_cache", [](LatentBody& b, Address cache, int num_blocks, int block_size) {
        b.cache = at(cache, int(b.input));
        b.num_blocks = num_blocks;
        b.block_size = block_size;
      });

  nb::class_<MambaBody, Body>(m, "MambaBody")
      .def(
          "__init__",
          [](MambaBody* self, Context& context, int stream, int input, const Linear& in, const Linear& out, Address dt_bias,
             Address a, float min_step, Address conv_weight, Address conv_bias, Address d, Address norm, float eps, int heads,
             int head_dim, int state, int groups, int conv_width) {
            auto* body = new (self) MambaBody(context, Type(stream), Type(input), in, out);
            Mamba2& b = body->mamba;
            b.type = Type(stream);
            b.out_type = Type(input);
            b.dt_bias = at<const float>(dt_bias);
            b.a = at<const float>(a);
            b.min_step = min_step;
            b.conv_weight = at<const float>(conv_weight);
            b.conv_bias = at<const float>(conv_bias);
            b.d = at<const float>(d);
            b.norm = at<const float>(norm);
            b.eps = eps;
            b.heads = heads;
            b.head_dim = head_dim;
            b.state = state;
            b.groups = groups;
            b.conv_width = conv_width;
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("set_cache", [](MambaBody& b, Address conv, Address ssm, int64_t num_slots) {
        b.mamba.conv_state = at<float>(conv);
        b.mamba.ssm_state = at<float>(ssm);
        b.num_slots = num_slots;
      });

  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, Context& context, int hidden, int stream, int input, Address embedding, int embedding_type,
             int64_t vocab, std::tuple<Address, int, float> last_norm) {
            new (self) Decoder(context, hidden, Type(stream), Type(input), {at(embedding, embedding_type), Type(embedding_type), vocab},
                               norm_weight(last_norm));
          },
          nb::keep_alive<1, 2>())
      .def(
          "add", [](Decoder& d, std::tuple<Address, int, float> norm, Body& body) { d.add(norm_weight(norm), body); },
          nb::keep_alive<1, 3>())
      .def(
          "run",
          [](Decoder& d, Address ids, int rows, Address logits_rows, int wanted, Address out, Address positions, Address slots,
             Address tables, int table_stride, Address cu_seqlens, Address seq_lens, int sequences, Address state_slots) {
            d.run({at<const int64_t>(ids), rows, at<const int64_t>(logits_rows), wanted, at(out, int(d.input())),
                   at<const int64_t>(positions), at<const int64_t>(slots), at<const int32_t>(tables),
                   at<const int32_t>(cu_seqlens), at<const int32_t>(seq_lens), table_stride, sequences,
                   at<const int64_t>(state_slots)});
          },
          no_gil);
}
