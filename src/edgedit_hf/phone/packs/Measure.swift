// Times the networks of this folder and writes results.csv into the app's documents, for `edgedit phone import`.
// Not run where it was written: that needs Xcode and a device.

import CoreML
import Foundation
import UIKit

struct Measure {
    let bundle = "@BUNDLE@"
    let header = "@HEADER@"
    let networks = [@NAMES@]
    let inputs: [(name: String, shape: [Int], type: String, file: String)] = [@SHAPES@]
    let coldLoads = @COLD@, warmups = @WARMUPS@, rounds = @ROUNDS@
    let units: MLComputeUnits = .cpuAndNeuralEngine
    let backend = "cpuAndNeuralEngine"

    /// Measure everything; `device` is what the rows call it.
    func run(device: String) async throws {
        await MainActor.run {
            UIDevice.current.isBatteryMonitoringEnabled = true
            UIApplication.shared.isIdleTimerDisabled = true
        }
        let documents = try FileManager.default.url(
            for: .documentDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let results = documents.appendingPathComponent("results.csv")
        try (header + "\n").write(to: results, atomically: true, encoding: .utf8)
        let file = try FileHandle(forWritingTo: results)
        try file.seekToEnd()
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let values = try MLDictionaryFeatureProvider(
            dictionary: Dictionary(uniqueKeysWithValues: try inputs.map { ($0.name, try array($0)) }))
        let version = ProcessInfo.processInfo.operatingSystemVersion
        let system = "iOS \(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
        let threads = ProcessInfo.processInfo.activeProcessorCount

        func write(_ network: String, _ phase: String, _ round: Int, _ seconds: Double) async throws {
            let level = await MainActor.run { UIDevice.current.batteryLevel }
            let battery = level < 0 ? "" : String(format: "%.2f", level)
            let time = ISO8601DateFormatter().string(from: Date())
            let row = [bundle, network, phase, "\(round)", String(format: "%.6f", 1000 * seconds), "\"\(device)\"", "",
                       backend, "\(threads)", system, battery, "", time]
            try file.write(contentsOf: Data((row.joined(separator: ",") + "\n").utf8))
        }
        func seconds(_ work: () throws -> Void) rethrows -> Double {
            let start = DispatchTime.now().uptimeNanoseconds
            try work()
            return Double(DispatchTime.now().uptimeNanoseconds - start) / 1e9
        }

        var compiled: [String: URL] = [:]
        for name in networks {
            guard let package = Bundle.main.url(
                forResource: name, withExtension: "mlpackage", subdirectory: "networks") else {
                fatalError("networks/\(name).mlpackage is not in the app; add it as a folder reference")
            }
            compiled[name] = try await MLModel.compileModel(at: package)
        }
        for load in 0..<coldLoads {
            for name in networks {
                let taken = try seconds { _ = try MLModel(contentsOf: compiled[name]!, configuration: configuration) }
                try await write(name, "cold", load, taken)
            }
        }
        for round in 0..<(warmups + rounds) {
            for name in networks {
                let model = try MLModel(contentsOf: compiled[name]!, configuration: configuration)
                _ = try model.prediction(from: values)
                let taken = try seconds { _ = try model.prediction(from: values) }
                try await write(name, round < warmups ? "warm" : "timed", round < warmups ? round : round - warmups, taken)
            }
            print("round \(round + 1) of \(warmups + rounds)")
        }
        try file.synchronize()
        print("measured: \(results.path)")
    }

    /// An input's raw values as an array; whole numbers as Int32, which is what Core ML takes.
    func array(_ input: (name: String, shape: [Int], type: String, file: String)) throws -> MLMultiArray {
        guard let url = Bundle.main.url(forResource: input.file, withExtension: nil, subdirectory: "inputs") else {
            fatalError("inputs/\(input.file) is not in the app; add it as a folder reference")
        }
        let data = try Data(contentsOf: url)
        let whole = input.type == "int64"
        let array = try MLMultiArray(shape: input.shape.map { NSNumber(value: $0) }, dataType: whole ? .int32 : .float32)
        data.withUnsafeBytes { raw in
            for place in 0..<array.count {
                if whole {
                    array[place] = NSNumber(value: Int32(raw.loadUnaligned(fromByteOffset: 8 * place, as: Int64.self)))
                } else {
                    array[place] = NSNumber(value: raw.loadUnaligned(fromByteOffset: 4 * place, as: Float.self))
                }
            }
        }
        return array
    }
}
