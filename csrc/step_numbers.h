// The numbers of optimizer steps as every backend's arithmetic uses them: float32, from doubles.
#pragma once

#include <cmath>
#include <cstdint>

namespace inq {

struct SgdNumbers {
  float lr, momentum, dampening_left, weight_decay;  // dampening_left: 1 − dampening
  bool nesterov, maximize, first_step;
};
struct AdamwNumbers {
  float beta1_left, beta1, beta2, beta2_left;  // beta1_left: 1 − beta1
  float decay;                                 // 1 − lr·weight_decay
  float step_size;                             // lr / (1 − beta1^step)
  float inverse_correction2;                   // 1 / sqrt(1 − beta2^step)
  float eps;
  bool maximize;
};

inline SgdNumbers sgd_numbers(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                              bool maximize, bool first_step) {
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(lr), f(momentum), f(1 - dampening), f(weight_decay), nesterov, maximize, first_step};
}
// `step`: its number, from 1.
inline AdamwNumbers adamw_numbers(double lr, double beta1, double beta2, double weight_decay, double eps, int64_t step,
                                  bool maximize) {
  const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(1 - beta1),        f(beta1),                       f(beta2), f(1 - beta2), f(1 - lr * weight_decay),
          f(lr / correction1), f(1 / std::sqrt(correction2)), f(eps),   maximize};
}

}  // namespace inq
