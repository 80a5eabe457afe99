// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "constraints.h"
#include "driver.h"
#include "error.h"
#include "json.h"
#include "names.h"
#include "table.h"

namespace sagert {
namespace {

struct RowReport {
  uint32_t broken;
  std::vector<Reason> reasons;
};

struct Report {
  std::vector<RowReport> rows;
  int32_t nearest = -1;
  std::string hint;
};

bool fits(const RankEntry& entry, const sagert_request& request) {
  constexpr int64_t kTileRows = 128;
  auto within = [](int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; };
  int64_t tiles =
      request.batch * request.heads_q * (request.seqlen_q / kTileRows + (request.seqlen_q % kTileRows != 0));
  int32_t causal = (request.flags & SAGERT_FLAG_CAUSAL) != 0 ? 1 : 0;
  return (entry.causal < 0 || entry.causal == causal) &&
         within(entry.head_dim_min, std::max(request.head_dim, request.head_dim_v), entry.head_dim_max) &&
         within(entry.seqlen_q_min, request.seqlen_q, entry.seqlen_q_max) &&
         within(entry.seqlen_k_min, request.seqlen_k, entry.seqlen_k_max) && tiles <= entry.tiles_max;
}

// The row's rank for this request.
int32_t rank_for(const RowEntry& row, const sagert_request& request) {
  for (int32_t i = 0; i < row.rank_count; ++i) {
    const RankEntry& entry = kRanks[row.rank_first + i];
    if (fits(entry, request)) return entry.rank;
  }
  return row.rank;
}

// How far a row is from serving the request. Another GPU or driver is farther than anything in the call.
int distance(uint32_t broken) {
  int count = 0;
  for (uint32_t rest = broken; rest != 0; rest &= rest - 1) ++count;
  if ((broken & kCapability) != 0) count += 1000;
  if ((broken & kDriverVersion) != 0) count += 20;
  if ((broken & kVariant) != 0) count += 5;  // nothing in the call can change it
  return count;
}

bool nearer(int32_t a, int32_t b, const Report& report, const sagert_device& device) {
  int distance_a = distance(report.rows[a].broken);
  int distance_b = distance(report.rows[b].broken);
  if (distance_a != distance_b) return distance_a < distance_b;
  auto gap = [&](int32_t row) {
    return std::min(std::abs(kRows[row].capability_min - device.capability),
                    std::abs(kRows[row].capability_max - device.capability));
  };
  if (gap(a) != gap(b)) return gap(a) < gap(b);
  bool too_wide = (report.rows[a].broken & report.rows[b].broken & (kHeadDim | kHeadDimV)) != 0;
  if (too_wide && kRows[a].head_dim_max != kRows[b].head_dim_max) {
    return kRows[a].head_dim_max > kRows[b].head_dim_max;
  }
  return kRows[a].rank < kRows[b].rank;
}

Report make_report(const sagert_request& request, const sagert_device& device) {
  Report report;
  for (int32_t i = 0; i < kRowCount; ++i) {
    uint32_t broken = broken_constraints(kRows[i], i, request, device);
    report.rows.push_back({broken, describe(broken, kRows[i], request, device)});
  }
  for (int32_t i = 0; i < kRowCount; ++i) {
    if (report.nearest < 0 || nearer(i, report.nearest, report, device)) report.nearest = i;
  }
  if (report.nearest >= 0) {
    for (const Reason& reason : report.rows[report.nearest].reasons) {
      if (reason.remedy.empty()) continue;
      report.hint += (report.hint.empty() ? "" : " and ") + reason.remedy;
    }
  }
  return report;
}

std::string summary(const sagert_request& request, const sagert_device& device) {
  std::string text =
      concat("precision ", precision_name(request.precision), ", ", dtype_name(request.dtype), ", q [", request.batch,
             ", ", request.heads_q, ", ", request.seqlen_q, ", ", request.head_dim, "], k [", request.batch, ", ",
             request.heads_kv, ", ", request.seqlen_k, ", ", request.head_dim, "]");
  if (request.head_dim_v != request.head_dim) text += concat(", head_dim_v ", request.head_dim_v);
  for (const char* name : flag_names(request.flags)) text += concat(", ", name);
  text += concat(" on ", device.name[0] != 0 ? std::string(device.name, strnlen(device.name, sizeof(device.name)))
                                             : std::string("a device"));
  return text + concat(" (compute capability ", capability_text(device.capability), ", driver with CUDA ",
                       cuda_version_text(device.driver_version), ")");
}

void write_request(JsonWriter& json, const sagert_request& request) {
  json.begin_object();
  json.member("batch", request.batch);
  json.member("heads_q", request.heads_q);
  json.member("heads_kv", request.heads_kv);
  json.member("seqlen_q", request.seqlen_q);
  json.member("seqlen_k", request.seqlen_k);
  json.member("head_dim", request.head_dim);
  json.member("head_dim_v", request.head_dim_v);
  json.member("dtype", dtype_name(request.dtype));
  json.member("precision", precision_name(request.precision));
  json.key("flags");
  json.begin_array();
  for (const char* name : flag_names(request.flags)) json.value(name);
  json.end_array();
  json.end_object();
}

void write_device(JsonWriter& json, const sagert_device& device) {
  json.begin_object();
  json.member("ordinal", int64_t{device.ordinal});
  json.member("name", std::string(device.name, strnlen(device.name, sizeof(device.name))));
  json.member("capability", int64_t{device.capability});
  json.member("driver_version", int64_t{device.driver_version});
  json.member("multiprocessors", int64_t{device.multiprocessors});
  json.member("shared_memory", int64_t{device.shared_memory});
  json.member("memory", device.memory);
  json.end_object();
}

void write_row(JsonWriter& json, const RowEntry& row, const sagert_request& request, const RowReport& report) {
  json.begin_object();
  json.member("id", row.id);
  json.member("rank", int64_t{rank_for(row, request)});
  json.member("accepted", report.broken == 0);
  json.key("reasons");
  json.begin_array();
  for (const Reason& reason : report.reasons) {
    json.begin_object();
    json.member("code", reason.code);
    json.member("text", reason.text);
    json.end_object();
  }
  json.end_array();
  json.end_object();
}

}  // namespace

Selection select(const sagert_request& request, const sagert_device& device) {
  Selection best;
  int32_t best_rank = 0;
  for (int32_t i = 0; i < kRowCount; ++i) {
    int32_t rank = rank_for(kRows[i], request);
    if (best.row >= 0 && rank >= best_rank) continue;
    if (broken_constraints(kRows[i], i, request, device) != 0) continue;
    best.row = i;
    best_rank = rank;
  }
  if (best.row >= 0) best.variant = find_variant(best.row, request);
  return best;
}

int32_t quantizing_variant(const Selection& selection, const sagert_request& request) {
  sagert_request widest = request;
  widest.flags |= kRows[selection.row].flags & (SAGERT_FLAG_CAUSAL | SAGERT_FLAG_MASK | SAGERT_FLAG_WINDOW);
  int32_t variant = find_variant(selection.row, widest);
  return variant >= 0 ? variant : selection.variant;
}

std::string explain_json(const sagert_request& request, const sagert_device& device) {
  Report report = make_report(request, device);
  Selection selection = select(request, device);
  bool refused = selection.row < 0;
  JsonWriter json;
  json.begin_object();
  json.key("request");
  write_request(json, request);
  json.key("device");
  write_device(json, device);
  json.member("selected", refused ? nullptr : kRows[selection.row].id);
  json.key("rows");
  json.begin_array();
  for (int32_t i = 0; i < kRowCount; ++i) write_row(json, kRows[i], request, report.rows[i]);
  json.end_array();
  json.member("nearest", refused && report.nearest >= 0 ? kRows[report.nearest].id : nullptr);
  json.member("hint", refused && !report.hint.empty() ? report.hint.c_str() : nullptr);
  json.end_object();
  return json.text();
}

std::string explain_refusal(const sagert_request& request, const sagert_device& device) {
  Report report = make_report(request, device);
  std::string text = "no kernel row serves " + summary(request, device);
  if (kRowCount == 0) return text + "\n  this build has no kernel rows";

  // Rows with the same reasons share a line. Of rows for other GPUs only the GPUs matter, unless there is nothing else.
  std::vector<std::pair<std::string, std::string>> groups;
  std::map<std::string, size_t> index;
  std::vector<int32_t> elsewhere;
  for (int32_t i = 0; i < kRowCount; ++i) {
    if ((report.rows[i].broken & kCapability) != 0) {
      elsewhere.push_back(i);
      continue;
    }
    std::string reasons;
    for (const Reason& reason : report.rows[i].reasons) reasons += (reasons.empty() ? "" : "; ") + reason.text;
    auto [position, is_new] = index.emplace(reasons, groups.size());
    if (is_new) {
      groups.emplace_back(kRows[i].id, reasons);
    } else {
      groups[position->second].first += concat(", ", kRows[i].id);
    }
  }
  for (const auto& [ids, reasons] : groups) text += concat("\n  ", ids, ": ", reasons);
  if (!elsewhere.empty()) {
    std::vector<std::string> ranges;
    for (int32_t i : elsewhere) {
      std::string range = capability_text(kRows[i].capability_min);
      if (kRows[i].capability_max != kRows[i].capability_min) range += "-" + capability_text(kRows[i].capability_max);
      if (std::find(ranges.begin(), ranges.end(), range) == ranges.end()) ranges.push_back(range);
    }
    std::string list;
    for (const std::string& range : ranges) list += (list.empty() ? "" : ", ") + range;
    text += concat("\n  ", elsewhere.size(), elsewhere.size() == 1 ? " row needs" : " rows need",
                   " another compute capability (", list, "); this device has ", capability_text(device.capability));
  }
  for (int32_t i = 0; i < kAbsenceCount; ++i) {
    const AbsenceEntry& absence = kAbsences[i];
    if (device.capability >= absence.capability_min && device.capability <= absence.capability_max &&
        (request.precision == absence.precision || request.precision == SAGERT_PRECISION_AUTO)) {
      text += concat("\n  ", precision_name(absence.precision), ": ", absence.reason);
    }
  }
  text += concat("\nnearest row: ", kRows[report.nearest].id);
  if (!report.hint.empty()) text += concat("\nto make it run: ", report.hint);
  return text;
}

}  // namespace sagert
