// The torch side: effective coefficients, threads, and the choice of an instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels.h"

namespace megatron_xielu {
namespace {

// Elements of one task. Chunks begin at fixed multiples of it and their sums are added in order, so
// the gradients of the alphas do not depend on the number of threads.
constexpr int64_t CHUNK = 1 << 15;

const Kernels* kernels_named(const std::string& name) {
  if (name == "baseline") return &baseline_kernels;
#if defined(__x86_64__)
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx2_kernels;
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &avx512_kernels;
#endif
  return nullptr;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512", "avx2", "baseline"})
    if (kernels_named(name)) names.push_back(name);
  return names;
}

const Kernels* active = kernels_named(instruction_sets().front());

void use_instruction_set(const std::string& name) {
  const Kernels* kernels = kernels_named(name);
  TORCH_CHECK_VALUE(kernels, "this machine cannot run ", name, "; it can run ", instruction_sets());
  active = kernels;
}

double softplus(double a) { return std::log1p(std::exp(-std::abs(a))) + std::max(a, 0.0); }
double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

// Which coefficient the i-th alpha of an activation stands for; the order is that of
// megatron_xielu.ops.family.
struct Formula {
  Shape shape;
  std::vector<char> alphas;  // '2', '3' or 'n'
};

Formula formula_named(const std::string& name) {
  if (name == "xielu") return {{false, Negative::exponential}, {'2', 'n'}};
  if (name == "xiprelu") return {{false, Negative::quadratic}, {'2', 'n'}};
  if (name == "xiep") return {{true, Negative::exponential}, {'3', '2', 'n'}};
  if (name == "relu2") return {{false, Negative::zero}, {}};
  TORCH_CHECK_VALUE(false, "unknown activation ", name);
}

Coefficients coefficients(const Formula& formula, at::TensorList alphas, double beta) {
  TORCH_CHECK_VALUE(alphas.size() == formula.alphas.size(), "expected ", formula.alphas.size(),
                    " alphas, got ", alphas.size());
  const bool exponential = formula.shape.negative == Negative::exponential;
  Coefficients c;
  c.beta = beta;
  c.p2 = 1;  // where it is not trained
  for (size_t i = 0; i < alphas.size(); ++i) {
    // zero times an infinite x would be no number
    const double least = std::numeric_limits<float>::min();
    const double effective = std::max(softplus(alphas[i].item<double>()), least);
    if (formula.alphas[i] == '2') c.p2 = effective;
    if (formula.alphas[i] == '3') c.p3 = effective;
    if (formula.alphas[i] == 'n') {
      c.n = exponential ? beta + effective : effective;
      c.n_minus_beta = effective;
    }
  }
  return c;
}

Storage storage_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Storage::float32;
    case at::kBFloat16: return Storage::bfloat16;
    case at::kHalf: return Storage::float16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// A table costs about as much as this many elements without one.
bool worth_a_table(const Task& task, int64_t count) {
  return task.storage != Storage::float32 && count > PATTERNS;
}

template <class Entry>
std::vector<Entry> filled(void (*fill)(const Task&, Entry*, int64_t, int64_t), const Task& task,
                          int64_t entries) {
  constexpr int64_t SHARE = 2048;
  std::vector<Entry> table(entries + 1);
  at::parallel_for(0, entries / SHARE, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share)
      fill(task, table.data(), share * SHARE, (share + 1) * SHARE);
  });
  return table;
}

// Calls f(begin, end, column) for runs of [begin, end) that lie in one row where there is a bias.
template <class F>
void for_runs(int64_t begin, int64_t end, int64_t row, const F& f) {
  if (row == 0) return f(begin, end, 0);
  while (begin < end) {
    const int64_t column = begin % row;
    const int64_t stop = std::min(end, begin + row - column);
    f(begin, stop, column);
    begin = stop;
  }
}

// x, y: the same dense layout and type; bias: the last dimension's length, x's type.
void forward(const at::Tensor& x, const std::optional<at::Tensor>& bias, at::TensorList alphas,
             double beta, const std::string& name, const at::Tensor& y, bool stream) {
  const Formula formula = formula_named(name);
  Task task{storage_of(x), formula.shape, coefficients(formula, alphas, beta)};
  task.stream = stream;
  const int64_t count = x.numel(), size = x.element_size(), row = bias ? bias->numel() : 0;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char* added = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  char* to = static_cast<char*>(y.data_ptr());
  std::vector<uint16_t> table;
  if (!bias && worth_a_table(task, count)) {
    table = filled(active->fill_y_table, task, PATTERNS);
    task.y_table = table.data();
  }
  at::parallel_for(0, (count + CHUNK - 1) / CHUNK, 1, [&](int64_t first, int64_t last) {
    for_runs(first * CHUNK, std::min(count, last * CHUNK), row,
             [&](int64_t begin, int64_t end, int64_t column) {
               active->forward(task, from + begin * size, added ? added + column * size : nullptr,
                               to + begin * size, end - begin);
             });
  });
}

// Writes dx and returns the gradients of the alphas in float64.
at::Tensor backward(const at::Tensor& grad_y, const at::Tensor& x,
                    const std::optional<at::Tensor>& bias, at::TensorList alphas, double beta,
                    const std::string& name, const at::Tensor& grad_x, bool stream) {
  const Formula formula = formula_named(name);
  Task task{storage_of(x), formula.shape, coefficients(formula, alphas, beta)};
  task.stream = stream;
  const int64_t count = x.numel(), size = x.element_size(), row = bias ? bias->numel() : 0;
  const int64_t chunks = (count + CHUNK - 1) / CHUNK;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char* grad = static_cast<const char*>(grad_y.const_data_ptr());
  const char* added = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  char* to = static_cast<char*>(grad_x.data_ptr());
  std::vector<Derivatives> table;
  if (!bias && worth_a_table(task, count)) {
    table = filled(active->fill_derivatives_table, task, PATTERNS);
    task.derivatives = table.data();
  }
  std::vector<Sums> partial(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      Sums sums;
      for_runs(chunk * CHUNK, std::min(count, (chunk + 1) * CHUNK), row,
               [&](int64_t begin, int64_t end, int64_t column) {
                 active->backward(task, grad + begin * size, from + begin * size,
                                  added ? added + column * size : nullptr, to + begin * size,
                                  end - begin, &sums);
               });
      partial[chunk] = sums;
    }
  });
  Sums sums;
  for (const Sums& part : partial) {
    sums.p2 += part.p2;
    sums.p3 += part.p3;
    sums.n += part.n;
  }
  at::Tensor grads = at::empty({static_cast<int64_t>(alphas.size())}, at::kDouble);
  for (size_t i = 0; i < alphas.size(); ++i) {
    const char which = formula.alphas[i];
    const double sum = which == '2' ? sums.p2 : which == '3' ? sums.p3 : sums.n;
    grads.data_ptr<double>()[i] = sum * sigmoid(alphas[i].item<double>());
  }
  return grads;
}

void copy(const at::Tensor& x, const at::Tensor& y, bool stream) {
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, x.nbytes() / 64, CHUNK / 16, [&](int64_t begin, int64_t end) {
    active->copy(from + begin * 64, to + begin * 64, (end - begin) * 64, stream);
  });
}

void read_two_write_one(const at::Tensor& x, const at::Tensor& z, const at::Tensor& y,
                        bool stream) {
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char* other = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, x.nbytes() / 64, CHUNK / 16, [&](int64_t begin, int64_t end) {
    active->read_two_write_one(from + begin * 64, other + begin * 64, to + begin * 64,
                               (end - begin) * 64, stream);
  });
}

}  // namespace

TORCH_LIBRARY(megatron_xielu_cpu, m) {
  m.def("forward(Tensor x, Tensor? bias, Tensor[] alphas, float beta, str name, Tensor(a!) y, bool stream) -> ()", forward);
  m.def("backward(Tensor grad_y, Tensor x, Tensor? bias, Tensor[] alphas, float beta, str name, Tensor(a!) grad_x, bool stream) -> Tensor", backward);
  m.def("copy(Tensor x, Tensor(a!) y, bool stream) -> ()", copy);
  m.def("read_two_write_one(Tensor x, Tensor z, Tensor(a!) y, bool stream) -> ()", read_two_write_one);
  m.def("instruction_sets() -> str[]", instruction_sets);
  m.def("use_instruction_set(str name) -> ()", use_instruction_set);
}

}  // namespace megatron_xielu
