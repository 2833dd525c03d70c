#include "placement.h"

#include <algorithm>
#include <stdexcept>

namespace pykernels {
namespace {

struct State {
  int64_t units;
  double cost;
  uint32_t parent;
  uint32_t option;
};

// Sorted by units, each cheaper than all before it.
void keep_best(std::vector<State>& states) {
  std::sort(states.begin(), states.end(),
            [](const State& a, const State& b) { return a.units != b.units ? a.units < b.units : a.cost < b.cost; });
  size_t kept = 0;
  for (const State& state : states)
    if (kept == 0 || state.cost < states[kept - 1].cost) states[kept++] = state;
  states.resize(kept);
}

void check(const std::vector<std::vector<LayerOption>>& layers, const std::vector<int64_t>& gradients, int64_t head,
           int64_t unit) {
  if (gradients.size() != layers.size()) throw std::invalid_argument("gradients: expected one number for each layer");
  if (unit < 1) throw std::invalid_argument("unit: expected 1 byte or more");
  if (head < 0) throw std::invalid_argument("head: expected 0 bytes or more");
  for (const auto& options : layers) {
    if (options.empty()) throw std::invalid_argument("options: expected at least one for each layer");
    for (const LayerOption& option : options)
      if (option.saved < 0 || option.forward < 0 || option.backward < 0)
        throw std::invalid_argument("options: expected 0 bytes or more");
  }
}

}  // namespace

std::optional<Placement> place_layers(const std::vector<std::vector<LayerOption>>& layers,
                                      const std::vector<int64_t>& gradients, int64_t head, int64_t budget,
                                      int64_t unit) {
  check(layers, gradients, head, unit);
  std::vector<std::vector<State>> reached{{{0, 0.0, 0, 0}}};
  for (size_t layer = 0; layer < layers.size(); layer++) {
    std::vector<State> next;
    for (size_t number = 0; number < layers[layer].size(); number++) {
      const LayerOption& option = layers[layer][number];
      const int64_t units = option.saved / unit + (option.saved % unit != 0);
      const int64_t beside = std::max(option.forward, gradients[layer] + option.backward);
      const int64_t most = budget < beside ? -1 : (budget - beside) / unit;
      for (size_t from = 0; from < reached[layer].size(); from++) {
        const State& state = reached[layer][from];
        if (state.units + units > most) break;
        next.push_back({state.units + units, state.cost + option.cost, static_cast<uint32_t>(from),
                        static_cast<uint32_t>(number)});
      }
    }
    keep_best(next);
    if (next.empty()) return std::nullopt;
    reached.push_back(std::move(next));
  }
  const std::vector<State>& last = reached.back();
  const int64_t most = budget < head ? -1 : (budget - head) / unit;
  auto end = std::upper_bound(last.begin(), last.end(), most, [](int64_t m, const State& s) { return m < s.units; });
  if (end == last.begin()) return std::nullopt;
  const State* state = &*(end - 1);  // the cheapest that fits is the one that keeps most
  Placement result{std::vector<int64_t>(layers.size()), state->units * unit, state->cost};
  for (size_t layer = layers.size(); layer > 0; layer--) {
    result.choices[layer - 1] = state->option;
    state = &reached[layer - 1][state->parent];
  }
  return result;
}

}  // namespace pykernels
