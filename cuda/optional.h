// What a binding is given for an optional tensor: torch 2 takes std::optional, torch 1 its own.
#pragma once
#include <ATen/ATen.h>
#include <torch/version.h>

#if TORCH_VERSION_MAJOR >= 2
template <class T> using Optional = std::optional<T>;
#else
template <class T> using Optional = c10::optional<T>;
#endif

inline const at::Tensor* given(const Optional<at::Tensor>& x) { return x.has_value() && x->defined() ? &*x : nullptr; }
