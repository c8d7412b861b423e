// Operator names and schemas of torch.ops.rwkv. The only file that includes torch's dispatcher,
// whose headers take seconds to compile.
#include <torch/library.h>

#include <string>

#include "common/cpu_width.h"
#include "common/launcher.h"
#include "common/operations.h"

TORCH_LIBRARY(rwkv, library) {
  // Registers the CPU operator `cpu`, and the CUDA operator `gpu` with the extra arguments device
  // and stream.
  const auto define_pair = [&](const std::string& cpu, const std::string& gpu, const std::string& inputs,
                               const std::string& gpu_inputs, const std::string& outputs, auto* on_cpu, auto* on_gpu) {
    library.def((cpu + "(" + inputs + ") -> " + outputs).c_str(), on_cpu);
    library.def((gpu + "(" + inputs + gpu_inputs + ", int device, int stream) -> " + outputs).c_str(), on_gpu);
  };
  const auto wkv4 = [&](const std::string& direction, const std::string& inputs, const std::string& outputs,
                        auto* on_cpu, auto* on_gpu) {
    define_pair("wkv4_cpu_" + direction, "wkv4_cuda_" + direction, "Tensor w, Tensor u, Tensor k, Tensor v, " + inputs,
                ", int segment", outputs, on_cpu, on_gpu);
  };
  const auto define = [&](const std::string& name, const std::string& inputs, const std::string& outputs, auto* on_cpu,
                          auto* on_gpu) { define_pair(name, "cuda_" + name, inputs, "", outputs, on_cpu, on_gpu); };
  wkv4("forward", "Tensor? state, Tensor? initial, Tensor? reset", "(Tensor y, Tensor state, Tensor saved)",
       cpu::wkv4_forward, gpu::wkv4_forward);
  wkv4("backward", "Tensor? initial, Tensor? reset, Tensor saved, Tensor gy, Tensor? gstate",
       "(Tensor gw, Tensor gu, Tensor gk, Tensor gv, Tensor gstate, Tensor ginitial)", cpu::wkv4_backward,
       gpu::wkv4_backward);
  const std::string wkv6_inputs = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, ";
  define_pair("wkv6_cpu_forward", "wkv6_cuda_forward", wkv6_inputs + "Tensor? state, Tensor? initial, Tensor? reset",
              ", int segment", "(Tensor y, Tensor state, Tensor saved)", cpu::wkv6_forward, gpu::wkv6_forward);
  define_pair("wkv6_cpu_backward", "wkv6_cuda_backward",
              wkv6_inputs + "Tensor? initial, Tensor? reset, Tensor saved, Tensor gy, Tensor? gstate", ", int segment",
              "(Tensor gr, Tensor gw, Tensor gk, Tensor gv, Tensor gu, Tensor gstate, Tensor ginitial)",
              cpu::wkv6_backward, gpu::wkv6_backward);
  const std::string wkv7_inputs = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, ",
                    wkv7_forward = wkv7_inputs + "Tensor? state, Tensor? initial, Tensor? reset",
                    wkv7_outputs = "(Tensor y, Tensor state, Tensor saved)",
                    wkv7_backward =
                        wkv7_inputs + "Tensor? initial, Tensor? reset, Tensor saved, Tensor gy, Tensor? gstate",
                    wkv7_gradients =
                        "(Tensor gr, Tensor gw, Tensor gk, Tensor gv, Tensor ga, Tensor gb, Tensor gstate, "
                        "Tensor ginitial)",
                    launch = ", int slice, int device, int stream";
  define_pair("wkv7_cpu_forward", "wkv7_cuda_forward", wkv7_forward, "", wkv7_outputs, cpu::wkv7_forward,
              gpu::wkv7_forward);
  define_pair("wkv7_cpu_backward", "wkv7_cuda_backward", wkv7_backward, "", wkv7_gradients, cpu::wkv7_backward,
              gpu::wkv7_backward);
  library.def(("wkv7_cuda_chunk_forward(" + wkv7_forward + launch + ") -> " + wkv7_outputs).c_str(),
              gpu::wkv7_chunk_forward);
  library.def(("wkv7_cuda_chunk_backward(" + wkv7_backward + launch + ") -> " + wkv7_gradients).c_str(),
              gpu::wkv7_chunk_backward);
  define("norm_forward", "Tensor x, Tensor w, Tensor b, float eps, ScalarType y_dtype", "(Tensor y, Tensor stats)",
         cpu::norm_forward, gpu::norm_forward);
  define("norm_backward", "Tensor gy, Tensor x, Tensor w, Tensor stats, bool affine",
         "(Tensor gx, Tensor gw, Tensor gb)", cpu::norm_backward, gpu::norm_backward);
  define("mix_forward", "Tensor x, Tensor last, Tensor? initial, Tensor? reset, Tensor mix", "Tensor[]",
         cpu::mix_forward, gpu::mix_forward);
  define("mix_backward", "Tensor[] gy, Tensor x, Tensor last, Tensor? initial, Tensor? reset, Tensor mix, bool want_mix",
         "(Tensor gx, Tensor glast, Tensor gmix)", cpu::mix_backward, gpu::mix_backward);
  define("gate_forward", "Tensor r, Tensor v", "Tensor", cpu::gate_forward, gpu::gate_forward);
  define("gate_backward", "Tensor g, Tensor r, Tensor v", "(Tensor gr, Tensor gv)", cpu::gate_backward,
         gpu::gate_backward);
  define("relu2_forward", "Tensor k", "Tensor", cpu::relu2_forward, gpu::relu2_forward);
  define("relu2_backward", "Tensor g, Tensor k", "Tensor", cpu::relu2_backward, gpu::relu2_backward);
  define("dropout", "Tensor x, Tensor seed, float p", "Tensor", cpu::dropout, gpu::dropout);
  define("dropout_add", "Tensor(a!) y, Tensor x, Tensor seed, float p", "()", cpu::dropout_add, gpu::dropout_add);
  define("loss", "Tensor(a!) logits, Tensor target, float l2wrap, bool gradient", "Tensor", cpu::loss, gpu::loss);
  define("nf4_dense",
         "Tensor packed, Tensor levels, Tensor absmax, Tensor absmax_levels, Tensor group_absmax, Tensor offset, "
         "int[] sizes, ScalarType dtype",
         "Tensor", cpu::nf4_dense, gpu::nf4_dense);
  define("int8_dense", "Tensor x, Tensor absmax, ScalarType dtype", "Tensor", cpu::int8_dense, gpu::int8_dense);
  define("adamw",
         "Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? m_max, Tensor(e!)? v_max, Tensor tables, "
         "Tensor clip, int step, float rate, float beta1, float beta2, float eps, float decay, int key",
         "()", cpu::adamw, gpu::adamw);
  library.def(
      "cuda_mix_dropout_forward(Tensor x, Tensor last, Tensor? initial, Tensor? reset, Tensor mix, Tensor[] seeds, "
      "float[] p, bool want_y, int device, int stream) -> Tensor[]",
      gpu::mix_dropout_forward);
  library.def("cuda_keys_forward(Tensor[] x, Tensor[] p, int device, int stream) -> Tensor[]", gpu::keys_forward);
  library.def(
      "cuda_keys_backward(Tensor[] g, Tensor[] x, Tensor[] p, bool affine, int device, int stream) -> Tensor[]",
      gpu::keys_backward);
  library.def("cuda_head_gate_forward(Tensor[] x, Tensor[] p, float eps, int device, int stream) -> Tensor",
              gpu::head_gate_forward);
  library.def(
      "cuda_head_gate_backward(Tensor g, Tensor[] x, Tensor[] p, float eps, bool affine, int device, int stream) -> "
      "Tensor[]",
      gpu::head_gate_backward);
  library.def(
      "cuda_shift_forward(Tensor x, Tensor last, Tensor? reset, Tensor mix, Tensor parts, Tensor[] seeds, float[] p, "
      "bool want_y, int device, int stream) -> Tensor[]",
      gpu::shift_forward);
  library.def(
      "cuda_shift_backward(Tensor[] gy, Tensor x, Tensor last, Tensor? reset, Tensor mix, Tensor parts, bool want_mix, "
      "int device, int stream) -> (Tensor gx, Tensor glast, Tensor gparts, Tensor gmix)",
      gpu::shift_backward);
  library.def("nf4_quantise(Tensor x, Tensor thresholds, Tensor(a!) packed) -> Tensor", cpu::nf4_quantise);
  library.def(
      "adam(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, float step, float rate, float beta1, float beta2, "
      "float eps, float decay, bool decoupled, float clip, Tensor(d!)? copy=None) -> ()",
      cpu::adam);
  library.def("cpu_vectors(str limit) -> str", choose_cpu_width);
  library.def("cuda_load(int device, str path) -> ()", launcher::load);
}
