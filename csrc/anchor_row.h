// What the computation of one anchor's row is given, and what it gives: see anchor.h.
#pragma once

namespace pcoherence {

enum class Status { ok, too_many_bins, not_finite };

// Weights of a row's candidates.
struct Weighed {
  double total = 0;     // W, their sum
  int count = 0;        // how many are > 0
  bool uniform = true;  // all that are > 0 are equal
};

template <class T>
struct AnchorRow {
  const T* student;         // [n] distances
  const T* teacher;         // [n] distances, or for hard ranks anything in the same order
  T* gradient;              // [n] out: of coefficient * L_i, see `chain`. May be `student`; null: the loss alone
  double coefficient = 1;   // c_i
  double chain = 1;         // what a gradient w.r.t. a distance is multiplied by before it is stored, ...
  bool chain_root = false;  // ... and with this divided by the distance (0 where that is 0): V of roots of squares
  double student_unit = 1, teacher_unit = 1;  // a distance in the metric = unit * the distance here
};

struct Outcome {
  double loss = 0;    // L_i, without the coefficient
  double stored = 0;  // sum of the gradient as stored, if the group sums it
  Status status = Status::ok;
};

}  // namespace pcoherence
