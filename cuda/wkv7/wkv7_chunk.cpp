// torch.ops.rwkv.wkv7_cuda_chunk_*: checks arguments, allocates outputs, and launches the CUDA kernels
// of the chunk form on torch's stream.
#include <algorithm>

#include "common/launcher.h"
#include "wkv7/wkv7_chunk_args.h"
#include "wkv7/wkv7_common.h"

namespace {

using arguments::flags;
using arguments::floats;

int dtype(const Tensor& r) {
  switch (r.scalar_type()) {
    case at::kFloat: return WKV7_FP32;
    case at::kBFloat16: return WKV7_BF16;
    case at::kHalf: return WKV7_FP16;
    default: TORCH_CHECK(false, "wkv7's CUDA kernels take fp32, bf16 or fp16; r is ", r.scalar_type());
  }
}

struct Launches {
  int64_t heads, slice, device, stream;
  Wkv7ChunkArgs args;

  // At most `slice` chunks of each sequence per launch: this limits the workspace.
  Launches(const Tensor& r, int64_t slice, int64_t device, int64_t stream)
      : heads(r.size(0) * r.size(2)), slice(slice), device(device), stream(stream), args{} {
    TORCH_CHECK(slice >= 1, "wkv7: the chunks per launch must be at least 1; got ", slice);
    TORCH_CHECK(r.size(3) == WKV7_CHUNK_N, "wkv7's chunk form takes heads of ", WKV7_CHUNK_N, " elements; r has ",
                r.size(3));
    args.T = r.size(1), args.H = r.size(2), args.dtype = dtype(r);
    args.all_chunks = wkv7::chunks(r);
    this->slice = std::min<int64_t>(slice, args.all_chunks);
  }
  // Bytes of workspace.
  Tensor workspace(const Tensor& r) const {
    return r.new_empty({heads * slice * int64_t(sizeof(Wkv7Chunk))}, r.options().dtype(at::kByte));
  }
  void set_chunks(int64_t begin) {
    args.begin = begin;
    args.chunks = std::min<int64_t>(slice, args.all_chunks - begin);
  }
  void run(const char* kernel, bool scan) const {
    launcher::launch(device, reinterpret_cast<void*>(stream), kernel, heads * (scan ? 1 : args.chunks),
                     WKV7_CHUNK_THREADS, &args);
  }
};

void set_inputs(Wkv7ChunkArgs& args, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                const Tensor& a, const Tensor& b, const Tensor* reset, const Tensor* initial, const Tensor& saved,
                const Tensor& work) {
  args.r = r.data_ptr(), args.w = floats(&w), args.k = k.data_ptr(), args.v = v.data_ptr(), args.a = a.data_ptr(),
  args.b = b.data_ptr();
  args.reset = flags(reset), args.initial = floats(initial);
  args.saved = saved.data_ptr<float>(), args.work = static_cast<Wkv7Chunk*>(work.data_ptr());
}

}  // namespace

Outputs gpu::wkv7_chunk_forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a,
                                const Tensor& b, const Optional<Tensor>& state, const Optional<Tensor>& initial,
                                const Optional<Tensor>& reset, int64_t slice, int64_t device,
                                int64_t stream) {
  wkv7::check_inputs(r, w, k, v, a, b, or_null(state), or_null(initial), or_null(reset));
  Launches launches(r, slice, device, stream);
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  const auto fp32 = r.options().dtype(at::kFloat);
  const Tensor y = r.new_empty(r.sizes()), last = r.new_empty({B, H, N, N}, fp32);
  const Tensor saved = r.new_empty({B, H, wkv7::chunks(r), N, N}, fp32);
  if (r.numel() == 0) return {y, last, saved};
  const Tensor work = launches.workspace(r);
  const Optional<Tensor> aligned_state = heads::aligned(state), aligned_initial = heads::aligned(initial);
  Wkv7ChunkArgs& args = launches.args;
  set_inputs(args, r, w, k, v, a, b, or_null(reset), or_null(aligned_initial), saved, work);
  args.from = floats(or_null(aligned_state)), args.to = last.data_ptr<float>(), args.y = y.data_ptr();
  for (int64_t begin = 0; begin < args.all_chunks; begin += launches.slice) {
    launches.set_chunks(begin);
    launches.run("wkv7_chunk_prepare", false);
    launches.run("wkv7_chunk_scan", true);
    launches.run("wkv7_chunk_output", false);
    args.from = args.to;
  }
  return {y, last, saved};
}

Wkv7GradientTensors gpu::wkv7_chunk_backward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                             const Tensor& a, const Tensor& b, const Optional<Tensor>& initial,
                                             const Optional<Tensor>& reset, const Tensor& saved, const Tensor& gy,
                                             const Optional<Tensor>& gstate, int64_t slice, int64_t device,
                                             int64_t stream) {
  wkv7::check_inputs(r, w, k, v, a, b, nullptr, or_null(initial), or_null(reset));
  heads::check_gradients("wkv7", r, wkv7::chunks(r), saved, gy, or_null(gstate));
  Launches launches(r, slice, device, stream);
  const int64_t B = r.size(0), H = r.size(2), N = r.size(3);
  const Tensor gr = r.new_empty(r.sizes()), gw = w.new_empty(w.sizes()), gk = k.new_empty(k.sizes()),
               gv = v.new_empty(v.sizes()), ga = a.new_empty(a.sizes()), gb = b.new_empty(b.sizes());
  const Tensor gfirst = w.new_empty({B, H, N, N});
  const Tensor ginitial = or_null(initial) ? w.new_zeros({B, H, N, N}) : Tensor();
  if (r.numel() == 0) return {gr, gw, gk, gv, ga, gb, gfirst, ginitial};
  const Tensor work = launches.workspace(r), gstates = w.new_empty({launches.heads, launches.slice, N, N});
  const Optional<Tensor> aligned_initial = heads::aligned(initial), aligned_gstate = heads::aligned(gstate);
  Wkv7ChunkArgs& args = launches.args;
  set_inputs(args, r, w, k, v, a, b, or_null(reset), or_null(aligned_initial), saved, work);
  args.backward = true;
  args.gy = gy.data_ptr(), args.gstates = gstates.data_ptr<float>();
  args.from = floats(or_null(aligned_gstate)), args.to = gfirst.data_ptr<float>();
  args.ginitial = or_null(initial) ? ginitial.data_ptr<float>() : nullptr;
  args.gr = gr.data_ptr(), args.gw = gw.data_ptr<float>(), args.gk = gk.data_ptr(), args.gv = gv.data_ptr(),
  args.ga = ga.data_ptr(), args.gb = gb.data_ptr();
  for (int64_t end = args.all_chunks; end > 0;) {
    const int64_t begin = (end - 1) / launches.slice * launches.slice;
    launches.set_chunks(begin);
    launches.run("wkv7_chunk_prepare", false);
    launches.run("wkv7_chunk_scan_gradient", true);
    launches.run("wkv7_chunk_gradient", false);
    args.from = args.to;
    end = begin;
  }
  return {gr, gw, gk, gv, ga, gb, gfirst, ginitial};
}
