// The binding: addresses and numbers in, nothing out. backend.py has checked shape, dtype, device and contiguity; here
// only the GIL is released. Built without torch and without NumPy.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "context.h"

namespace nb = nanobind;
using namespace nvfp4;

namespace {

using Address = uintptr_t;  // 0: absent

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels. Use nvfp4_runtime.kernels.cpu.backend.CPUBackend, which checks what this does not.";
  m.def("supported_isas", &supported_isas, "ISA variants this machine can run, best first.");

  const nb::call_guard<nb::gil_scoped_release> no_gil;

  nb::class_<PackedNVFP4>(m, "PackedNVFP4")
      .def(
          "__init__",
          [](PackedNVFP4* self, Address codes, Address scales, Address row_scale, Address bias, int n, int k,
             float input_scale) {
            new (self) PackedNVFP4(at<const uint8_t>(codes), at<const uint8_t>(scales), at<const float>(row_scale),
                                   at<const float>(bias), n, k, input_scale);
          },
          no_gil)
      .def_ro("nbytes", &PackedNVFP4::bytes);

  nb::class_<Context>(m, "Context")
      .def(nb::init<int, const std::string&>())
      .def_prop_ro("isa", &Context::isa)
      .def_prop_ro("threads", &Context::threads)
      .def(
          "linear_nvfp4",
          [](Context& c, const PackedNVFP4& w, Address x, int type, int rows, Address out, int out_type) {
            c.linear_nvfp4(w, at(x), Type(type), rows, at(out), Type(out_type));
          },
          no_gil)
      .def(
          "linear_dense",
          [](Context& c, Address w, int w_type, Address bias, Address x, int type, int rows, int n, int k, Address out,
             int out_type) {
            c.linear_dense(at(w), Type(w_type), at<const float>(bias), at(x), Type(type), rows, n, k, at(out),
                           Type(out_type));
          },
          no_gil)
      .def(
          "rms_norm",
          [](Context& c, Address x, Address residual, Address weight, int weight_type, Address out, int type,
             int out_type, int rows, int width, float eps) {
            c.rms_norm({at(x), at(residual), at(weight), Type(weight_type), at(out), Type(type), Type(out_type), width,
                        eps},
                       rows);
          },
          no_gil)
      .def(
          "silu_mul",
          [](Context& c, Address x, Address out, int type, int out_type, int rows, int width) {
            c.silu_mul({at(x), at(out), Type(type), Type(out_type), width}, rows);
          },
          no_gil)
      .def(
          "rope",
          [](Context& c, Address qkv, int type, int rows, Address positions, Address cos, Address sin, Address q_norm,
             Address k_norm, int norm_type, float eps, Address q_out, Address k, Address v, int kv_type, float k_scale,
             float v_scale, Address slots, int heads, int kv_heads, int head_dim, int rotary_dim, int block_size,
             int64_t num_slots, int64_t num_positions, Address k_blocks,
             Address v_blocks) {
            c.rope({at(qkv), Type(type), at<const int64_t>(positions), at<const float>(cos), at<const float>(sin),
                    at(q_norm), at(k_norm), Type(norm_type), eps, at(q_out), at(k), at(v), Type(kv_type), k_scale,
                    v_scale, at<const int64_t>(slots), heads, kv_heads, head_dim, rotary_dim, block_size,
                    at<uint8_t>(k_blocks), at<uint8_t>(v_blocks)},
                   rows, num_slots, num_positions);
          },
          no_gil)
      .def(
          "attention",
          [](Context& c, Address q, int type, int rows, Address out, int out_type, Address k, Address v, int kv_type,
             float k_scale, float v_scale, float scale, Address tables, int table_stride, Address cu_seqlens, Address seq_lens,
             int sequences, int heads, int kv_heads, int head_dim, int block_size, int window, int num_blocks,
             Address k_blocks, Address v_blocks) {
            Attention a{at(q),    Type(type),   at(out), Type(out_type),
                        at(k),    at(v),        Type(kv_type),
                        k_scale,  v_scale,      scale,
                        at<const int32_t>(tables), table_stride, heads,
                        kv_heads, head_dim,     block_size,
                        window,   at<const uint8_t>(k_blocks), at<const uint8_t>(v_blocks)};
            c.attention(a, at<const int32_t>(cu_seqlens), at<const int32_t>(seq_lens), sequences, rows, num_blocks);
          },
          no_gil)
      .def(
          "quantize_activation",
          [](Context& c, Address x, int type, int rows, int k, float input_scale, Address codes, Address scales) {
            PackX a{};
            a.x = at(x);
            a.type = Type(type);
            a.m = rows;
            a.k = k;
            a.input_scale = input_scale;
            c.quantize(a, at<uint8_t>(codes), at<uint8_t>(scales));
          },
          no_gil, "For tests: uint8 [rows, k] codes and e4m3 [rows, k / 16] scales.");
}
