// What the Python side of the emulation calls, by C linkage: the order of threads, and the counters
// of the launches and of the workspaces since they were last read, as JSON.
#include <sstream>
#include <string>

#include "emulator.h"

#define DE_EXPORT extern "C" __attribute__((visibility("default")))

namespace densenet_efficient::emulation {
namespace {

constexpr const char* kAccessNames[] = {"global load", "global store", "shared load",
                                        "shared store"};

// Names hold no control characters; quotes and backslashes are escaped.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

void write(std::ostringstream& out, const TrafficCounters& traffic) {
  out << "{\"bytes\":" << traffic.bytes << ",\"sectors\":" << traffic.sectors
      << ",\"distinct\":" << traffic.distinct << ",\"distinct_bytes\":" << traffic.distinct_bytes
      << "}";
}

void write(std::ostringstream& out, const Parameters& parameters) {
  constexpr char kDigits[] = "0123456789abcdef";
  for (const unsigned char byte : parameters.bytes) out << kDigits[byte >> 4] << kDigits[byte & 15];
}

void write(std::ostringstream& out, const Counters& launch) {
  out << "{\"op\":" << quoted(launch.op) << ",\"kernel\":" << quoted(launch.kernel)
      << ",\"grid_x\":" << launch.grid_x << ",\"grid_y\":" << launch.grid_y
      << ",\"block\":" << launch.block << ",\"shared_bytes\":" << launch.shared_bytes
      << ",\"mma\":" << launch.mma << ",\"mma_flops\":" << launch.mma_flops
      << ",\"ldmatrix\":" << launch.ldmatrix << ",\"shuffles\":" << launch.shuffles
      << ",\"barriers\":" << launch.barriers << ",\"tiles\":" << launch.parameters.tiles
      << ",\"ranges\":" << launch.parameters.ranges << ",\"parameters\":\"";
  write(out, launch.parameters);
  out << "\",\"sites\":[";
  const char* separator = "";
  for (const SiteCounters& site : launch.sites) {
    out << separator << "{\"file\":" << quoted(site.file) << ",\"line\":" << site.line
        << ",\"access\":" << quoted(kAccessNames[static_cast<int>(site.access)])
        << ",\"requests\":" << site.requests << ",\"bytes\":" << site.bytes
        << ",\"units\":" << site.units << ",\"ideal\":" << site.ideal << "}";
    separator = ",";
  }
  out << "],\"tensors\":[";
  separator = "";
  for (const TensorCounters& tensor : launch.tensors) {
    out << separator << "{\"name\":" << quoted(tensor.name) << ",\"load\":";
    write(out, tensor.load);
    out << ",\"store\":";
    write(out, tensor.store);
    out << "}";
    separator = ",";
  }
  out << "]}";
}

}  // namespace
}  // namespace densenet_efficient::emulation

DE_EXPORT void de_emulation_set_device(int multiprocessors, int shared_bytes) {
  densenet_efficient::emulation::set_device({multiprocessors, shared_bytes});
}

DE_EXPORT void de_emulation_set_seed(unsigned long long seed) {
  densenet_efficient::emulation::set_seed(seed);
}

// Not zero: launches are only listed, and nothing is computed.
DE_EXPORT void de_emulation_set_listing(int listing) {
  densenet_efficient::emulation::set_listing(listing != 0);
}

DE_EXPORT void de_emulation_name_range(const char* name, const void* begin, long long bytes) {
  densenet_efficient::emulation::name_range(name, begin, bytes);
}

// Valid until the next call.
DE_EXPORT const char* de_emulation_report() {
  namespace emulation = densenet_efficient::emulation;
  static std::string report;
  std::ostringstream out;
  const emulation::WorkspaceCounters workspace = emulation::take_workspace_counters();
  out << "{\"workspace\":{\"peak\":" << workspace.peak << ",\"unused\":" << workspace.unused
      << "},\"launches\":[";
  const char* separator = "";
  for (const emulation::Counters& launch : emulation::launches()) {
    out << separator;
    emulation::write(out, launch);
    separator = ",";
  }
  out << "]}";
  report = out.str();
  emulation::clear_launches();
  return report.c_str();
}
