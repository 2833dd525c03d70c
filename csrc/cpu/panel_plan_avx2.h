// How an AVX2 product with packed panels is cut into items of work. Include after the standard headers.
#pragma once

#include "../launchers.h"

namespace pykernels::cpu::avx2 {
namespace {

// Rows of a block along K (192 KiB) and products (96 KiB) that an item keeps in a second-level cache.
constexpr int64_t kItemRows = 192;
constexpr int64_t kItemColumns = 128;

struct Panels {
  int64_t parts, panels;  // along M and along N
};

// Sets what a plan says of rows and columns, of M rows in `tiles` tiles; tile_items is the caller's.
inline Panels plan_panels(Int8MatmulPlan& plan, int64_t M, int64_t N, int64_t tiles, int tile_rows, int tile_columns) {
  const int64_t parts = (M + kItemRows - 1) / kItemRows;
  plan.row_items = tiles;
  plan.rows_per_item = (tiles + parts - 1) / parts * tile_rows;
  plan.columns_per_item = kItemColumns;
  const auto panels = [&] { return (N + plan.columns_per_item - 1) / plan.columns_per_item; };
  // Narrower where there are few, so that every thread finds work.
  while (plan.columns_per_item > tile_columns && panels() * parts < 16) plan.columns_per_item /= 2;
  return {parts, panels()};
}

}  // namespace
}  // namespace pykernels::cpu::avx2
