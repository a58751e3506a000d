// Every kernel, by type: to be instantiated where launch() is defined.
#pragma once

#include "launch.h"

#define PCOH_ROWS(...) template void launch(const __VA_ARGS__&, const Plan&, char*, Stream);
#define PCOH_STREAM(...) template void launch(const __VA_ARGS__&, Stream);
#define PCOH_INSTANTIATE(T)                                                 \
  template Plan plan<T>(const Device&, std::int64_t, std::int64_t, Method); \
  template Resources resources<T>(RowKernel, const Plan&);                  \
  PCOH_ROWS(SmallTask<T>)                                                   \
  PCOH_STREAM(RowSumsTask<T>)                                               \
  PCOH_STREAM(ProductTask<T>)                                               \
  PCOH_STREAM(PullTask<T>)                                                  \
  PCOH_STREAM(ClearTask<T>)                                                 \
  PCOH_STREAM(Several<CentreTask<T>>)                                       \
  PCOH_STREAM(Several<PrepareTask<T>>)                                      \
  PCOH_STREAM(Several<IdenticalTask<T>>)                                    \
  PCOH_STREAM(Several<FirstTask<T>>)                                        \
  PCOH_STREAM(TransposeTask<T>)                                             \
  PCOH_STREAM(SmallGradientTask<T>)
// Soft ranks on their own are computed in float64, whatever the values.
#define PCOH_INSTANTIATE_SOFT_RANK PCOH_ROWS(SoftRankTask<double>)
