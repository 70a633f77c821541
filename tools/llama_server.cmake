# llama-server alone, linked to the libraries of an installed wheel (WHEEL_LIBRARIES) instead of building them again.
#
# tools/llama_server.py puts this in the place of llama.cpp's own CMakeLists.txt, whose sources it reads as they are. No
# web UI, no TLS, no download: nothing here reaches for the network.
cmake_minimum_required(VERSION 3.21)
project("llama.cpp" C CXX)

foreach(name IN ITEMS ggml-base ggml-cpu ggml llama)
  find_library(path_of_${name} NAMES lib${name}.so.0 lib${name}.0.dylib lib${name}.dylib
    PATHS "${WHEEL_LIBRARIES}" NO_DEFAULT_PATH REQUIRED)
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION "${path_of_${name}}")
  target_include_directories(${name} INTERFACE include ggml/include)
  target_compile_definitions(${name} INTERFACE GGML_SHARED GGML_BACKEND_SHARED LLAMA_SHARED)
endforeach()
target_link_libraries(ggml INTERFACE ggml-base ggml-cpu)
target_link_libraries(llama INTERFACE ggml)
if(NOT APPLE)
  add_link_options("LINKER:-rpath-link,${WHEEL_LIBRARIES}") # what they need in turn: a GPU's backend
endif()

# The program finds them beside itself, wherever it is kept.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
if(APPLE)
  set(CMAKE_INSTALL_RPATH "@loader_path")
else()
  set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

# What the folders below expect of the file that stood here.
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_VERSION_MAJOR 0)
set(LLAMA_VERSION_BASE 0.0.0)
set(LLAMA_SUBPROCESS ON)
set(LLAMA_TOOLS_INSTALL OFF)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_BUILD_TOOLS OFF)
set(LLAMA_BUILD_UI OFF)
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_OPENSSL OFF)
set(LLAMA_LLGUIDANCE OFF)
set(MTMD_VIDEO OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_NUMBER 0)
set(BUILD_NUMBER 0)
set(BUILD_COMMIT "${WHEEL_VERSION}")
set(LLAMA_BUILD_COMMIT "${WHEEL_VERSION}")
find_package(Threads REQUIRED)
include(cmake/common.cmake)
include(cmake/license.cmake)
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")

add_subdirectory(vendor)
add_subdirectory(common)
add_subdirectory(tools/ui)
add_subdirectory(tools/mtmd)
add_subdirectory(tools/server)

# Images are never sent to it, and the sixty files that read them take as long as all the rest when each is compiled
# by itself.
set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 24)
file(GLOB alone tools/mtmd/*.cpp) # these don't agree with each other
set_source_files_properties(${alone} TARGET_DIRECTORY mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# Most files are small and read the same headers for longer than themselves.
foreach(name IN ITEMS llama-common server-context)
  target_precompile_headers(${name} PRIVATE <algorithm> <functional> <map> <memory> <regex> <sstream> <string>
    <unordered_map> <variant> <vector>)
endforeach()
