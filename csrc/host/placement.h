// What each layer keeps for backward, chosen so that the least is computed again within a memory budget.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace pykernels {

// One way to run a layer. Bytes: kept from its forward to its backward; held beside that while its forward runs, and
// while its backward runs. cost: operations that it repeats, or anything else that is added up.
struct LayerOption {
  int64_t saved;
  int64_t forward;
  int64_t backward;
  double cost;
};

struct Placement {
  std::vector<int64_t> choices;  // an option's number for each layer
  int64_t saved;                 // bytes, in whole units
  double cost;
};

// The cheapest choice of one option for each layer such that, with S the bytes that layers 0 to i keep,
//   S + forward of i <= budget   and   S + gradients[i] + backward of i <= budget   for each i,
//   S + head <= budget           after the last,
// where gradients[i] are bytes that are there when the backward of layer i starts. None where nothing fits.
//
// Dynamic programming over the layers. Its states are the sums S for which nothing cheaper has an S as small, at most
// budget / unit of them; `saved` is rounded up to whole units, so that with unit 1 the result is exact, and with any
// other exact for the rounded sizes and never above the budget.
std::optional<Placement> place_layers(const std::vector<std::vector<LayerOption>>& layers,
                                      const std::vector<int64_t>& gradients, int64_t head, int64_t budget,
                                      int64_t unit);

}  // namespace pykernels
